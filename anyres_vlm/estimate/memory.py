"""Bytes that one rank holds, by what they are for.

What a backend keeps follows its own code (DeepSpeed 0.19): ZeRO-1 in bf16 keeps whole gradients in fp32 and bf16,
ZeRO-2 its partition of them in fp32 and two buckets, ZeRO-3 its partition of everything and what it has gathered.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from anyres_vlm.estimate.activations import Numbers, StepBytes
from anyres_vlm.estimate.sharding import Sharding

FP32, BF16 = 4, 2  # bytes


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
