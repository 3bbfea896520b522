"""The samples of a stage as the planner sees them: counted by an index, or assumed as the recipe's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anyres_vlm.config import StageName
from anyres_vlm.data.index.table import read_index
from anyres_vlm.errors import DataError
from anyres_vlm.geometry import Size, Tiling, plan_tiles

Ints = NDArray[np.int64]

PICTURE = Size(height=480, width=640)  # the commonest size in COCO, from which most of the recipe's pictures are


@dataclass(frozen=True)
class Recipe:
    """A stage's data: sizes as published; tokens a sample, which are not, as assumed from the size of the files."""

    samples: int
    with_image: int
    text_tokens: int
    supervised: int


ASSUMED: dict[StageName, Recipe] = {
    "stage1": Recipe(558_128, 558_128, text_tokens=25, supervised=20),  # blip_laion_cc_sbu_558k
    "stage2": Recipe(665_298, 624_610, text_tokens=250, supervised=150),  # llava_v1_5_mix665k
}


@dataclass(frozen=True)
class StageSamples:
    """One entry a sample, rejects left out; `origin` says where the numbers are from."""

    tokens: Ints
    tiles: Ints
    supervised: Ints
    origin: str

    @property
    def pairs(self) -> int:
        """Pairs of a token and one that it sees, over all samples."""
        return int((self.tokens * (self.tokens + 1)).sum()) // 2


def indexed_samples(path: Path) -> StageSamples:
    """The good samples of an index. Raises `DataError` for a file that is none, or that has none."""
    index = read_index(path)
    good = np.flatnonzero(index.ok)
    if not len(good):
        raise DataError(f"{path}: none of its {len(index)} samples is ok")
    return StageSamples(index.tokens[good], index.tiles[good], index.supervised[good], f"the index {path}")


def assumed_samples(recipe: Recipe, tiling: Tiling) -> StageSamples:
    """So many equal samples with a picture each, then those of text alone."""
    plan = plan_tiles(PICTURE, tiling)
    has_image = np.arange(recipe.samples) < recipe.with_image
    origin = (
        f"assumed: {recipe.samples:,} samples, {recipe.with_image:,} of them with a picture of {PICTURE.width}x"
        f"{PICTURE.height} ({plan.total_tokens:,} tokens), {recipe.text_tokens} tokens of text, "
        f"{recipe.supervised} supervised"
    )
    tokens = recipe.text_tokens + has_image * plan.total_tokens
    return StageSamples(
        tokens.astype(np.int64),
        (has_image * plan.num_tiles).astype(np.int64),
        np.full(recipe.samples, recipe.supervised, np.int64),
        origin,
    )
