"""Devices, the samples of a stage, and the hours that its FLOPs take."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anyres_vlm.config import StageName
from anyres_vlm.data.index.table import read_index
from anyres_vlm.data.packing.cost import Flops, training_flops
from anyres_vlm.errors import DataError, UsageError, did_you_mean
from anyres_vlm.geometry import Size, Tiling, plan_tiles
from anyres_vlm.train.metrics import PEAKS

Ints = NDArray[np.int64]

PICTURE = Size(height=480, width=640)  # the commonest size in COCO, from which most of the recipe's pictures are


GB = 1e9


# What a name is called in `PEAKS`, and the memory in GB (10^9 bytes) that the maker states.
MEMORY = {
    "a100-40gb": ("A100", 40), "a100-80gb": ("A100", 80), "a10g-24gb": ("A10G", 24), "l4-24gb": ("L4", 24),
    "l40s-48gb": ("L40S", 48), "rtx4090-24gb": ("RTX 4090", 24), "h100-80gb": ("H100", 80), "h800-80gb": ("H800", 80),
    "h200-141gb": ("H200", 141), "mi300x-192gb": ("MI300X", 192), "b200-180gb": ("B200", 180),
}  # fmt: skip


@dataclass(frozen=True)
class Device:
    """`memory` in bytes; `peak` in dense bf16 FLOP/s, as for the MFU that training reports."""

    name: str
    memory: float
    peak: float


def find_device(name: str) -> Device:
    """A device by its name. Raises `UsageError` with the nearest one for a name that is none."""
    known = MEMORY.get(name.lower())
    if known is None:
        near = did_you_mean(name.lower(), list(MEMORY))
        raise UsageError(f"--device {name}: expected one of {', '.join(sorted(MEMORY))}{near}")
    model, memory = known
    return Device(name.lower(), memory * GB, PEAKS[model] * 1e12)


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


@dataclass(frozen=True)
class Work:
    """FLOPs of a stage: useful ones, as MFU counts them, and those that checkpointing computes again."""

    useful: float
    recomputed: float

    def hours(self, device: Device, gpus: int, mfu: float, straggler: float = 1.0) -> float:
        """At an MFU that a busy rank reaches where nothing is computed again; others wait for the slowest rank."""
        return (self.useful + self.recomputed) * straggler / (gpus * device.peak * mfu * 3600)

    def implied_mfu(self, device: Device, gpus: int, hours: float) -> float:
        """The share of the peak that a run of so many hours made useful."""
        return self.useful / (gpus * device.peak * hours * 3600)


def stage_work(samples: StageSamples, flops: Flops, trained: Collection[str], epochs: int, *, recomputes: bool) -> Work:
    """Of all epochs of a stage. Checkpointing runs the language model's layers, and those of a trained encoder, forward
    once more, not the head."""
    tokens, tiles = int(samples.tokens.sum()), int(samples.tiles.sum())
    useful = training_flops(
        flops,
        trained,
        tokens=tokens,
        supervised_tokens=int(samples.supervised.sum()),
        pairs=samples.pairs,
        tiles=tiles,
    )
    again = flops.token * tokens + flops.pair * samples.pairs if recomputes else 0.0
    if recomputes and "vision_tower" in trained:
        again += flops.encoder * tiles
    return Work(epochs * useful, epochs * again)
