"""Memory of a rank: weights, gradients, optimizer state and activations, by preset, checkpointing and pack size."""

from __future__ import annotations

import math
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anyres_vlm.config import RunConfig, StageName
from anyres_vlm.errors import UsageError
from anyres_vlm.model.quantize import decoder_matrices
from anyres_vlm.preflight.estimate.activations import Numbers, PackSize, StepBytes, micro_step_bytes, stage_skeleton
from anyres_vlm.preflight.estimate.workload import StageSamples
from anyres_vlm.train.engine.deepspeed_settings import find_preset, read_zero
from anyres_vlm.train.recipe import frozen_matrices

FP32, BF16 = 4, 2  # bytes
# NF4 takes 4 bits per weight, an 8-bit scale per 64 weights and a 32-bit scale per 256 scales.
NF4 = (4 + 8 / 64 + 32 / (64 * 256)) / 8
# Shipped presets in order of the data that they move between ranks and host.
PRESETS = (None, "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")


@dataclass(frozen=True)
class Sharding:
    """Settings of a preset, sizes in elements. `stage` 0 is the plain backend with a full model on each rank."""

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
    """Read a shipped preset or a JSON file by name; missing keys have DeepSpeed's defaults. None is the plain backend.

    `width`, the language model's hidden size, sets bucket sizes that are "auto", as in a run.
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
    """Numbers of parameters: all, trained, in tensors that ZeRO-3 does not partition, and in the largest tensor.

    Of the frozen ones, `halved` are those that the plain backend holds in bf16 under autocast, `packed` in 4 bits.
    """

    total: int
    trained: int
    halved: int
    packed: int
    small: int
    largest: int


def count_parameters(model: nn.Module, sharding: Sharding, packed: Iterable[Tensor] = ()) -> Parameters:
    """Count a model's parameters; the preset decides which tensors are `small`, `packed` ones are held in 4 bits."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    in_4_bits = {id(parameter): parameter.numel() for parameter in packed}
    return Parameters(
        total=sum(size for size, _ in sizes),
        trained=sum(size for size, trained in sizes if trained),
        halved=sum(weight.numel() for weight in frozen_matrices(model) if id(weight) not in in_4_bits),
        packed=sum(in_4_bits.values()),
        small=sum(size for size, _ in sizes if size <= sharding.persistent),
        largest=max(size for size, _ in sizes),
    )


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank's device, and those of rank 0 on its `host`.

    Gradient `buckets`, `gathered` weights, saved `activations` and `working` memory exist only during a micro-step,
    `update` only during the optimizer step. On the host, rank 0 first reads the complete model, in bf16 if DeepSpeed
    casts it, and later assembles checkpoints.
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
        """Bytes that stay on the device throughout a step."""
        return self.weights + self.masters + self.moments + self.gradients

    @property
    def peak(self) -> float:
        """Peak bytes on the device."""
        micro_step = self.buckets + self.gathered + self.activations + self.working
        return self.resting + max(micro_step, self.update)


def numbers_of(sharding: Sharding, precision: str) -> Numbers:
    """Return the dtypes of a backend: with bf16, DeepSpeed casts the weights and the plain backend uses autocast."""
    if precision == "fp32":
        return "fp32"
    return "autocast" if sharding.stage == 0 else "bf16"


def rank_memory(
    count: Parameters, sharding: Sharding, numbers: Numbers, ranks: int, step: StepBytes, *, fused: bool = True
) -> RankMemory:
    """Return the memory of a rank. AdamW that is not `fused`, as on the CPU, needs two more tensors for an update."""
    stage, item = sharding.stage, BF16 if numbers == "bf16" else FP32
    mine = count.trained / ranks if stage else count.trained
    host = sharding.offloads_optimizer
    return RankMemory(
        weights=_weights(count, sharding, numbers, ranks),
        masters=0 if host or not stage else FP32 * mine,
        moments=0 if host else 2 * FP32 * mine,
        gradients=_gradients(count, sharding, item, ranks),
        buckets=_buckets(count, sharding, item, ranks),
        gathered=_gathered(count, sharding, item, ranks),
        activations=step.held,
        # A packed matrix is unpacked to bf16 where it is used.
        working=step.peak - step.held + (BF16 * count.largest if count.packed else 0),
        update=_update(count, sharding, item, mine, fused),
        host=max(
            item * (count.total - count.packed) + BF16 * count.packed,
            _host(count, sharding, item, ranks) + _snapshot(count),
        ),
    )


def _weights(count: Parameters, sharding: Sharding, numbers: Numbers, ranks: int) -> float:
    item = BF16 if numbers == "bf16" else FP32
    if sharding.stage < 3:
        saved = (FP32 - BF16) * count.halved if numbers == "autocast" else 0
        return item * (count.total - count.packed) - saved + NF4 * count.packed
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
        # Gradients are views of DistributedDataParallel's, except in the first two steps, before their order is known.
        return FP32 * count.trained if ranks > 1 else 0
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
    """Return the bytes of masters, moments, gradients and updated weights; ZeRO-3 also accumulates gradients."""
    if not sharding.offloads_optimizer:
        return 0
    each = 4 * FP32 + (FP32 if sharding.stage == 3 else item)
    weights = item * count.total / ranks if sharding.offloads_weights else 0
    return each * count.trained / ranks + weights


def _snapshot(count: Parameters) -> float:
    """Return the bytes of a checkpoint before it is written: trained weights and both moments in fp32."""
    return 3 * FP32 * count.trained


LARGEST = 65_536  # tokens of the largest pack that is considered
DOCUMENTS = 2  # in a pack: more of them need no more memory, but a longer trace
DENSEST = 0.99  # quantile of tiles and supervised tokens per token; packs of many samples are closer to the mean


class StageMemory:
    """Memory of a stage for any capacity between the longest sample and `largest`, from traces of a few packs.

    Other sizes are interpolated linearly. This overestimates: the peak is a maximum of phases that grow linearly.
    """

    def __init__(
        self, config: RunConfig, stage: StageName, samples: StageSamples, ranks: int, largest: int = LARGEST
    ) -> None:
        self.config, self.stage, self.samples, self.ranks = config, stage, samples, ranks
        self.longest = int(samples.tokens.max())
        self.capacity = max(config.stage(stage).capacity, self.longest)
        self.sizes = sorted({self.longest, self.capacity, max(largest, self.capacity)})
        self._traces: dict[tuple[Numbers, bool], list[StepBytes]] = {}
        with torch.device("meta"):
            self.model = stage_skeleton(config, stage)

    def on_ranks(self, ranks: int) -> StageMemory:
        """Return the memory on another number of ranks; the traces are shared."""
        other = copy(self)
        other.ranks = ranks
        return other

    def pack(self, tokens: int) -> PackSize:
        """Return a full pack of samples with many tiles and labels."""
        lengths = self.samples.tokens
        tiles = np.quantile(self.samples.tiles / lengths, DENSEST)
        supervised = np.quantile(self.samples.supervised / lengths, DENSEST)
        return PackSize(tokens, DOCUMENTS, math.ceil(tokens * tiles), math.ceil(tokens * supervised))

    def count(self, sharding: Sharding) -> Parameters:
        """Count the stage's parameters."""
        is_quantized = self.config.stage(self.stage).is_quantized
        packed = decoder_matrices(self.model.language_model) if is_quantized else ()
        return count_parameters(self.model, sharding, (layer.weight for _, layer in packed))

    def at(self, sharding: Sharding, recomputes: bool, tokens: int) -> RankMemory:
        """Return the memory of a rank with packs of `tokens` tokens."""
        numbers = numbers_of(sharding, self.config.precision)
        count = self.count(sharding)
        return rank_memory(count, sharding, numbers, self.ranks, self._step_bytes(numbers, recomputes, tokens))

    def without_packs(self, sharding: Sharding) -> RankMemory:
        """Return the memory of a rank without packs."""
        numbers = numbers_of(sharding, self.config.precision)
        count = self.count(sharding)
        return rank_memory(count, sharding, numbers, self.ranks, StepBytes(0, 0, 0))

    def largest(self, sharding: Sharding, recomputes: bool, usable: float) -> int | None:
        """Return the largest number of tokens in a pack that fits; None if not even the longest sample does."""
        if self.without_packs(sharding).peak > usable:
            return None  # saves the trace
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
