"""Devices, the samples of a stage, and the hours of its FLOPs."""

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

PICTURE = Size(height=480, width=640)  # the commonest size in COCO, the source of most images of the recipe
GB = 1e9
# Device name -> its name in `PEAKS` and its memory in GB (10^9 bytes) as specified.
MEMORY = {
    "a100-40gb": ("A100", 40), "a100-80gb": ("A100", 80), "a10g-24gb": ("A10G", 24), "l4-24gb": ("L4", 24),
    "l40s-48gb": ("L40S", 48), "rtx4090-24gb": ("RTX 4090", 24), "h100-80gb": ("H100", 80), "h800-80gb": ("H800", 80),
    "h200-141gb": ("H200", 141), "mi300x-192gb": ("MI300X", 192), "b200-180gb": ("B200", 180),
}  # fmt: skip


@dataclass(frozen=True)
class Device:
    """A GPU; `memory` in bytes, `peak` in dense bf16 FLOP/s as in the MFU of training."""

    name: str
    memory: float
    peak: float


def find_device(name: str) -> Device:
    """Return a device by name. Raises `UsageError` with the nearest name for an unknown one."""
    known = MEMORY.get(name.lower())
    if known is None:
        near = did_you_mean(name.lower(), list(MEMORY))
        raise UsageError(f"--device {name}: expected one of {', '.join(sorted(MEMORY))}{near}")
    model, memory = known
    return Device(name.lower(), memory * GB, PEAKS[model] * 1e12)


@dataclass(frozen=True)
class Recipe:
    """Data of a stage: published sample counts, and tokens per sample estimated from file sizes."""

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
    """One entry per sample, without rejects; `origin` says where the numbers come from."""

    tokens: Ints
    tiles: Ints
    supervised: Ints
    origin: str

    @property
    def pairs(self) -> int:
        """Number of pairs of a query and a visible key, over all samples."""
        return int((self.tokens * (self.tokens + 1)).sum()) // 2


def indexed_samples(path: Path) -> StageSamples:
    """Return the good samples of an index. Raises `DataError` for any other file and if there are none."""
    index = read_index(path)
    good = np.flatnonzero(index.ok)
    if not len(good):
        raise DataError(f"{path}: none of its {len(index)} samples is ok")
    return StageSamples(index.tokens[good], index.tiles[good], index.supervised[good], f"the index {path}")


def assumed_samples(recipe: Recipe, tiling: Tiling) -> StageSamples:
    """Return equal samples with one image each, followed by those with only text."""
    plan = plan_tiles(PICTURE, tiling)
    has_image = np.arange(recipe.samples) < recipe.with_image
    origin = (
        f"assumed: {recipe.samples:,} samples, {recipe.with_image:,} of them with an image of {PICTURE.width}x"
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
    """FLOPs of a stage: useful ones, which MFU counts, and those of recomputation by checkpointing."""

    useful: float
    recomputed: float

    def hours(self, device: Device, gpus: int, mfu: float, straggler: float = 1.0) -> float:
        """Return the hours if busy ranks reach this MFU without recomputation and wait for the slowest rank."""
        return (self.useful + self.recomputed) * straggler / (gpus * device.peak * mfu * 3600)

    def implied_mfu(self, device: Device, gpus: int, hours: float) -> float:
        """Return the MFU of a run that took `hours`."""
        return self.useful / (gpus * device.peak * hours * 3600)


def stage_work(samples: StageSamples, flops: Flops, trained: Collection[str], epochs: int, *, recomputes: bool) -> Work:
    """Return the FLOPs of all epochs.

    Checkpointing recomputes the layers of the language model, but not its head, and those of a trained encoder.
    """
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
