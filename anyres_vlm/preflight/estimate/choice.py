"""Cheapest setup of each stage that fits the devices, and the estimate of a run: memory, packs, hours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from anyres_vlm.checkpoints.describe import describe_bases
from anyres_vlm.config import STAGES, RunConfig, StageName
from anyres_vlm.data.packing.cost import Flops, derive_cost
from anyres_vlm.data.packing.plan import plan_epoch
from anyres_vlm.data.packing.report import PlanReport, measure
from anyres_vlm.errors import UsageError
from anyres_vlm.preflight.estimate.memory import (
    PRESETS,
    Parameters,
    RankMemory,
    Sharding,
    StageMemory,
    read_sharding,
)
from anyres_vlm.preflight.estimate.workload import (
    ASSUMED,
    GB,
    Device,
    StageSamples,
    Work,
    assumed_samples,
    indexed_samples,
    stage_work,
)
from anyres_vlm.train.recipe import trained_rates
from anyres_vlm.train.steps import model_flops


@dataclass(frozen=True)
class Way:
    """A preset with or without activation checkpointing.

    `memory` is for packs of the stage's capacity, or None if not even the weights fit; `least` is the peak in bytes
    without packs. `largest` is the largest capacity that fits, or None if the longest sample does not. `reason` says
    why the stage's capacity does not fit.
    """

    sharding: Sharding
    recomputes: bool
    least: float
    memory: RankMemory | None
    largest: int | None
    reason: str | None

    @property
    def name(self) -> str:
        """The preset, with `checkpointing` if activations are recomputed."""
        return self.sharding.name + (" + checkpointing" if self.recomputes else "")

    @property
    def price(self) -> tuple[bool, bool, int]:
        """Sort key: offloading costs most time, then recomputation, then communication."""
        offloads = self.sharding.offloads_optimizer or self.sharding.offloads_weights
        return offloads, self.recomputes, self.sharding.stage


def compare_ways(stage: StageMemory, usable: float) -> list[Way]:
    """Return all shipped presets and the stage's own, with and without checkpointing, for devices of `usable` bytes."""
    own = stage.config.stage(stage.stage).deepspeed
    width = stage.model.language_model.config.hidden_size
    presets = [*PRESETS, *([own] if own not in PRESETS else [])]
    return [
        _way(stage, read_sharding(name, width), recomputes, usable)
        for name, recomputes in product(presets, (False, True))
    ]


def cheapest(ways: Sequence[Way]) -> Way | None:
    """Return the cheapest way that fits the stage's capacity, otherwise one that fits the longest sample, or None."""
    fitting = [way for way in ways if way.largest is not None]
    return min(fitting, key=lambda way: (way.reason is not None, way.price), default=None)


def _way(stage: StageMemory, sharding: Sharding, recomputes: bool, usable: float) -> Way:
    reason: str | None = None
    alone = stage.without_packs(sharding)
    if sharding.stage == 3 and stage.config.cache_features is not None:
        return Way(sharding, recomputes, alone.peak, None, None, "cache_features does not work with ZeRO-3")
    if sharding.stage == 3 and stage.config.stage(stage.stage).is_quantized:
        return Way(sharding, recomputes, alone.peak, None, None, "lora.quantize does not work with ZeRO-3")
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


# Usual sizes with CUDA 12 since Ampere: measure yours as the memory that nvidia-smi shows in addition to torch's.
CUDA_CONTEXT, NCCL_BUFFERS = 0.6 * GB, 1.0 * GB


@dataclass(frozen=True)
class Machines:
    """Devices with one rank each; `headroom` is the share of memory for fragmentation and errors of the estimate."""

    device: Device
    gpus: int
    headroom: float = 0.06
    mfu: float = 0.4

    @property
    def usable(self) -> float:
        """Bytes available for tensors on one device."""
        return self.device.memory * (1 - self.headroom) - self.reserved

    @property
    def reserved(self) -> float:
        """Bytes in use before the first tensor: the CUDA context, and NCCL's buffers if there are several ranks."""
        return CUDA_CONTEXT + (NCCL_BUFFERS if self.gpus > 1 else 0)


@dataclass(frozen=True)
class StageEstimate:
    """Resources of one stage. `chosen`, `plan`, `work` and `hours` are None if nothing fits."""

    stage: StageName
    samples: StageSamples
    parameters: Parameters
    capacity: int
    longest: int
    ways: list[Way]
    chosen: Way | None
    plan: PlanReport | None
    work: Work | None
    hours: float | None

    @property
    def reason(self) -> str | None:
        """Why nothing fits, for the way that needs the least memory."""
        if self.chosen is not None:
            return None
        last = min(self.ways, key=lambda way: (way.memory is None, way.least))
        return f"nothing fits; {last.name} needs the least memory, but: {last.reason}"


def estimate_run(config: RunConfig, indexes: Mapping[StageName, Path], machines: Machines) -> list[StageEstimate]:
    """Estimate both stages. Without an index, given here or in the configuration, the recipe's data is assumed."""
    return [_estimate_stage(config, stage, indexes.get(stage), machines) for stage in STAGES]


def _estimate_stage(config: RunConfig, stage: StageName, index: Path | None, machines: Machines) -> StageEstimate:
    settings = config.stage(stage)
    index = index or (settings.data.index if settings.data.index and settings.data.index.exists() else None)
    samples = indexed_samples(index) if index else assumed_samples(ASSUMED[stage], describe_bases(config.model).tiling)
    memory = StageMemory(config, stage, samples, machines.gpus)
    ways = compare_ways(memory, machines.usable)
    chosen = cheapest(ways)
    plan = work = hours = None
    if chosen is not None:
        flops = model_flops(memory.model)
        if flops is None:
            raise UsageError(f"cannot count the FLOPs of {memory.model.config.llm}: its time is unknown, see --debug")
        plan = _measure_plan(config, stage, samples, flops, min(memory.capacity, chosen.largest or 0), machines.gpus)
        work = stage_work(samples, flops, trained_rates(config, stage), settings.epochs, recomputes=chosen.recomputes)
        hours = work.hours(machines.device, machines.gpus, machines.mfu, plan.straggler)
    count = memory.count(ways[0].sharding)
    return StageEstimate(stage, samples, count, memory.capacity, memory.longest, ways, chosen, plan, work, hours)


def _measure_plan(
    config: RunConfig, stage: StageName, samples: StageSamples, flops: Flops, capacity: int, ranks: int
) -> PlanReport:
    """Plan the first epoch as training does and return its figures."""
    settings = config.stage(stage)
    made = plan_epoch(
        samples.tokens,
        samples.tiles,
        capacity=capacity,
        batch_size=settings.batch_size,
        packs_per_step=settings.packs_per_step,
        seed=config.seed,
        epoch=0,
        cost=derive_cost(flops),
    )
    return measure(made, ranks)
