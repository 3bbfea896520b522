"""The presets that a stage could run with, and the cheapest one that fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from anyres_vlm.estimate.memory import RankMemory
from anyres_vlm.estimate.sharding import PRESETS, Sharding, read_sharding
from anyres_vlm.estimate.stage_memory import StageMemory

GB = 1e9


@dataclass(frozen=True)
class Way:
    """A preset with or without activation checkpointing.

    `memory` is that of a pack of the stage's capacity, None where not even the weights fit; `least` are the bytes that
    are held whatever the pack. `largest` is the capacity
    up to which packs fit, None where the longest sample does not. `reason` says why the stage's capacity does not fit.
    """

    sharding: Sharding
    recomputes: bool
    least: float
    memory: RankMemory | None
    largest: int | None
    reason: str | None

    @property
    def name(self) -> str:
        """The preset, and whether it computes activations again."""
        return self.sharding.name + (" + checkpointing" if self.recomputes else "")

    @property
    def price(self) -> tuple[bool, bool, int]:
        """What it costs beside the useful work, the dearest first: the host's work, recomputation, communication."""
        offloads = self.sharding.offloads_optimizer or self.sharding.offloads_weights
        return offloads, self.recomputes, self.sharding.stage


def compare_ways(stage: StageMemory, usable: float) -> list[Way]:
    """The shipped presets and the stage's own, each with and without checkpointing, on devices of so many bytes."""
    own = stage.config.stage(stage.stage).deepspeed
    width = stage.model.language_model.config.hidden_size
    presets = [*PRESETS, *([own] if own not in PRESETS else [])]
    return [
        _way(stage, read_sharding(name, width), recomputes, usable)
        for name, recomputes in product(presets, (False, True))
    ]


def cheapest(ways: Sequence[Way]) -> Way | None:
    """The cheapest way that fits the stage's capacity, or else the longest sample."""
    fitting = [way for way in ways if way.largest is not None]
    return min(fitting, key=lambda way: (way.reason is not None, way.price), default=None)


def _way(stage: StageMemory, sharding: Sharding, recomputes: bool, usable: float) -> Way:
    reason: str | None = None
    alone = stage.without_packs(sharding)
    if sharding.stage == 3 and stage.config.cache_features is not None:
        return Way(sharding, recomputes, alone.peak, None, None, "cache_features does not go with ZeRO-3")
    if alone.peak > usable:
        reason = f"weights, gradients and optimizer alone take {alone.peak / GB:.1f} GB"
        return Way(sharding, recomputes, alone.peak, None, None, reason)
    largest = stage.largest(sharding, recomputes, usable)
    memory = stage.at(sharding, recomputes, stage.capacity)
    if largest is None:
        peak = stage.at(sharding, recomputes, stage.longest).peak
        reason = f"the longest sample, {stage.longest:,} tokens, takes {peak / GB:.1f} GB"
    elif largest < stage.capacity:
        reason = f"packs of {stage.capacity:,} tokens take {memory.peak / GB:.1f} GB: set capacity to {largest:,}"
    return Way(sharding, recomputes, alone.peak, memory, largest, reason)
