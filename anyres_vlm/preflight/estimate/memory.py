"""What a rank holds: weights, gradients, optimizer state and activations, by preset, checkpointing and pack size."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from anyres_vlm.config import RunConfig, StageName
from anyres_vlm.errors import UsageError
from anyres_vlm.preflight.estimate.activations import Numbers, PackSize, StepBytes, micro_step_bytes, stage_skeleton
from anyres_vlm.preflight.estimate.workload import StageSamples
from anyres_vlm.train.engine.deepspeed_settings import find_preset, read_zero

FP32, BF16 = 4, 2  # bytes


# The shipped presets from the one that moves least between ranks and host to the one that moves most.
PRESETS = (None, "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")


@dataclass(frozen=True)
class Sharding:
    """A preset's figures; sizes are numbers of elements. `stage` 0 is the plain backend: the whole model on a rank."""

    name: str
    stage: int = 0
    offloads_optimizer: bool = False
    offloads_weights: bool = False
    bucket: int = 0
    buckets: int = 0
    prefetch: int = 0
    persistent: int = 0
    live: int = 0
    subgroup: int = 0


def read_sharding(preset: str | None, width: int | None = None) -> Sharding:
    """Read a shipped preset or a JSON file by name, with DeepSpeed's defaults for what it leaves out. None is plain.

    `width`, the language model's hidden size, decides bucket sizes of "auto", as in a run.
    """
    if preset is None:
        return Sharding("none")
    path = find_preset(preset)
    try:
        return _sharding(Path(preset).stem, read_zero(path, width))
    except (AttributeError, OverflowError, TypeError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"--deepspeed {path}: zero_optimization: {error}") from None


def _sharding(name: str, zero: dict[str, Any]) -> Sharding:
    stage = int(zero.get("stage", 0))
    overlaps = zero.get("overlap_comm", stage == 3)
    return Sharding(
        name=name,
        stage=stage,
        offloads_optimizer=_is_offloaded(zero, "offload_optimizer"),
        offloads_weights=_is_offloaded(zero, "offload_param"),
        bucket=int(zero.get("reduce_bucket_size", 5e8)),
        buckets=(1 if stage == 3 else 1 + bool(overlaps)) if zero.get("contiguous_gradients", True) else 0,
        prefetch=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
        persistent=int(zero.get("stage3_param_persistence_threshold", 1e5)),
        live=int(zero.get("stage3_max_live_parameters", 1e9)),
        subgroup=int(zero.get("sub_group_size", 1e9)),
    )


def _is_offloaded(zero: dict[str, Any], part: str) -> bool:
    return bool((zero.get(part) or {}).get("device", "none") != "none")


@dataclass(frozen=True)
class Parameters:
    """Numbers of a stage's parameters: all, trained, in tensors that ZeRO-3 leaves whole, and in the largest tensor."""

    total: int
    trained: int
    small: int
    largest: int


def count_parameters(parameters: Iterable[nn.Parameter], sharding: Sharding) -> Parameters:
    """Count a model's parameters; `small` ones are as a preset says."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in parameters]
    return Parameters(
        total=sum(size for size, _ in sizes),
        trained=sum(size for size, trained in sizes if trained),
        small=sum(size for size, _ in sizes if size <= sharding.persistent),
        largest=max(size for size, _ in sizes),
    )


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank's device, but for `host`.

    `buckets` of gradients, `gathered` weights, `activations` that autograd keeps and what is `working` on them are
    there during a micro-step; `update` is what the optimizer step takes for a moment. On the host every rank first
    reads the whole model, in bf16 where DeepSpeed casts it, before it is split; later rank 0, of which `host` is,
    puts checkpoints together there.
    """

    weights: float
    masters: float
    moments: float
    gradients: float
    buckets: float
    gathered: float
    activations: float
    working: float
    update: float
    host: float

    @property
    def resting(self) -> float:
        """What stays on the device through all micro-steps of a step."""
        return self.weights + self.masters + self.moments + self.gradients

    @property
    def peak(self) -> float:
        """The most that is there at any time."""
        micro_step = self.buckets + self.gathered + self.activations + self.working
        return self.resting + max(micro_step, self.update)


def numbers_of(sharding: Sharding, precision: str) -> Numbers:
    """What a backend computes in: DeepSpeed casts the weights, the plain backend casts as it goes."""
    if precision == "fp32":
        return "fp32"
    return "autocast" if sharding.stage == 0 else "bf16"


def rank_memory(
    count: Parameters, sharding: Sharding, numbers: Numbers, ranks: int, step: StepBytes, *, fused: bool = True
) -> RankMemory:
    """What a rank holds. Without `fused` AdamW, as on the CPU, an update takes two more tensors as large as its own."""
    stage, item = sharding.stage, BF16 if numbers == "bf16" else FP32
    mine = count.trained / ranks if stage else count.trained
    host = sharding.offloads_optimizer
    return RankMemory(
        weights=_weights(count, sharding, item, ranks),
        masters=0 if host or not stage else FP32 * mine,
        moments=0 if host else 2 * FP32 * mine,
        gradients=_gradients(count, sharding, item, ranks),
        buckets=_buckets(count, sharding, item, ranks),
        gathered=_gathered(count, sharding, item, ranks),
        activations=step.held,
        working=step.peak - step.held,
        update=_update(count, sharding, item, mine, fused),
        host=max(item * count.total, _host(count, sharding, item, ranks) + _snapshot(count, item)),
    )


def _weights(count: Parameters, sharding: Sharding, item: int, ranks: int) -> float:
    if sharding.stage < 3:
        return item * count.total
    split = 0 if sharding.offloads_weights else count.total / ranks
    return item * (split + (count.small if ranks > 1 else 0))


def _gradients(count: Parameters, sharding: Sharding, item: int, ranks: int) -> float:
    if sharding.stage == 0:
        return FP32 * count.trained
    if sharding.stage == 1:
        return (FP32 + (item if item == BF16 else 0)) * count.trained
    if sharding.stage == 3 and sharding.offloads_optimizer:
        return 0
    return FP32 * count.trained / ranks


def _buckets(count: Parameters, sharding: Sharding, item: int, ranks: int) -> float:
    if sharding.stage == 0:
        return FP32 * count.trained if ranks > 1 else 0  # DistributedDataParallel's hold all gradients once more
    if sharding.stage == 1 and item == BF16:  # whole gradients are reduced in place
        return 0
    staged = count.largest if sharding.stage < 3 and sharding.offloads_optimizer else 0
    return item * (sharding.buckets * sharding.bucket + staged)


def _gathered(count: Parameters, sharding: Sharding, item: int, ranks: int) -> float:
    if sharding.stage < 3 or ranks == 1:
        return 0
    ahead = sharding.prefetch if count.total > sharding.live else 0
    return item * (min(count.total, sharding.live) + ahead)


def _update(count: Parameters, sharding: Sharding, item: int, mine: float, fused: bool) -> float:
    if sharding.offloads_optimizer:
        return 0
    flat = min(mine, sharding.subgroup) if sharding.stage == 3 else mine
    copied = flat if sharding.stage == 3 or (sharding.stage and item == FP32) else 0
    scratch = 0 if fused else 2 * (flat if sharding.stage else count.largest)
    return FP32 * (copied + scratch)


def _host(count: Parameters, sharding: Sharding, item: int, ranks: int) -> float:
    """Masters, gradients, moments, and the weights that go back; with ZeRO-3 accumulated gradients beside them."""
    if not sharding.offloads_optimizer:
        return 0
    each = 4 * FP32 + (FP32 if sharding.stage == 3 else item)
    weights = item * count.total / ranks if sharding.offloads_weights else 0
    return each * count.trained / ranks + weights


def _snapshot(count: Parameters, item: int) -> float:
    """A checkpoint before it is written: weights and two moments of what is trained in fp32, the rest as it is."""
    return 3 * FP32 * count.trained + item * (count.total - count.trained)


LARGEST = 65_536  # tokens: up to there packs are looked at
DOCUMENTS = 2  # of a pack: more hold the same bytes, and take the trace longer
DENSEST = 0.99  # of the samples, by tiles and by supervised tokens a token: packs of many samples are nearer the mean


class StageMemory:
    """Traces a few packs and answers for any capacity between the longest sample and `LARGEST`.

    Between two packs a straight line is drawn. The most of several phases that each grow in a line lies below it.
    """

    def __init__(self, config: RunConfig, stage: StageName, samples: StageSamples, ranks: int) -> None:
        self.config, self.stage, self.samples, self.ranks = config, stage, samples, ranks
        self.longest = int(samples.tokens.max())
        self.capacity = max(config.stage(stage).capacity, self.longest)
        self.sizes = sorted({self.longest, self.capacity, max(LARGEST, self.capacity)})
        self._traces: dict[tuple[Numbers, bool], list[StepBytes]] = {}
        with torch.device("meta"):
            self.model = stage_skeleton(config, stage)

    def pack(self, tokens: int) -> PackSize:
        """A full pack of the samples' kind, as rich in tiles and labels as they come."""
        lengths = self.samples.tokens
        tiles = np.quantile(self.samples.tiles / lengths, DENSEST)
        supervised = np.quantile(self.samples.supervised / lengths, DENSEST)
        return PackSize(tokens, DOCUMENTS, math.ceil(tokens * tiles), math.ceil(tokens * supervised))

    def at(self, sharding: Sharding, recomputes: bool, tokens: int) -> RankMemory:
        """On one rank, with packs of so many tokens."""
        numbers = numbers_of(sharding, self.config.precision)
        count = count_parameters(self.model.parameters(), sharding)
        return rank_memory(count, sharding, numbers, self.ranks, self._step_bytes(numbers, recomputes, tokens))

    def without_packs(self, sharding: Sharding) -> RankMemory:
        """On one rank, with no pack at all."""
        numbers = numbers_of(sharding, self.config.precision)
        count = count_parameters(self.model.parameters(), sharding)
        return rank_memory(count, sharding, numbers, self.ranks, StepBytes(0, 0, 0))

    def largest(self, sharding: Sharding, recomputes: bool, usable: float) -> int | None:
        """The most tokens a pack may have; None where not even the longest sample fits."""
        if self.without_packs(sharding).peak > usable:
            return None  # and nothing needs to be traced
        low, high = self.longest, self.sizes[-1]
        if self.at(sharding, recomputes, low).peak > usable:
            return None
        while high - low > 1:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.at(sharding, recomputes, middle).peak <= usable else (low, middle)
        return high if self.at(sharding, recomputes, high).peak <= usable else low

    def _step_bytes(self, numbers: Numbers, recomputes: bool, tokens: int) -> StepBytes:
        key = numbers, recomputes
        if key not in self._traces:
            settings = self.config.stage(self.stage)
            every = recomputes and (settings.activation_checkpointing or True)
            settings = settings.model_copy(update={"activation_checkpointing": every})
            config = self.config.model_copy(update={self.stage: settings})
            self._traces[key] = micro_step_bytes(config, self.stage, [self.pack(size) for size in self.sizes], numbers)
        traces = self._traces[key]
        parts = ((trace.forward, trace.held, trace.backward) for trace in traces)
        return StepBytes(*(round(float(np.interp(tokens, self.sizes, part))) for part in zip(*parts, strict=True)))
