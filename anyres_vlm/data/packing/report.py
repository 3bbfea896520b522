"""What a plan is worth: efficiency against its bound, stragglers at a number of ranks, samples a step, and advice."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anyres_vlm.data.packing.bound import bound_efficiency
from anyres_vlm.data.packing.plan import Plan, deal, round_packs

FAIR = 0.98  # bound below which another capacity is worth a look
BUDGETS = (4096, 6144, 8192, 10_240, 12_288, 16_384, 20_480, 24_576, 32_768)


@dataclass(frozen=True)
class PlanReport:
    """Figures of a plan at a number of ranks, as DESIGN.md defines them.

    `straggler` is the sum over micro-steps of the costliest rank over the sum of the mean rank; `utilisation` its
    inverse. `idle_places` are the (micro-step, rank) places of a full step that no pack fills. The samples a step are
    those of full steps.
    """

    samples: int
    tokens: int
    tiles: int
    packs: int
    steps: int
    packs_per_step: int
    capacity: int
    ranks: int
    efficiency: float
    bound: float
    straggler: float
    utilisation: float
    idle_places: int
    batch_size: int
    samples_per_step_min: int
    samples_per_step_mean: float
    samples_per_step_max: int
    advice: tuple[str, ...]


def measure(plan: Plan, world_size: int) -> PlanReport:
    """Measure a plan for `world_size` ranks."""
    tokens = int(plan.tokens.sum())
    efficiency = tokens / (plan.num_packs * plan.capacity)
    bound = bound_efficiency(plan.tokens, plan.capacity).efficiency
    micro_step, _ = assign(plan, world_size)
    slowest = np.maximum.reduceat(plan.costs, np.flatnonzero(np.diff(micro_step, prepend=-1)))
    utilisation = float(plan.costs.sum() / (world_size * slowest.sum()))
    ends = plan.starts[np.minimum(np.arange(plan.num_steps + 1) * plan.packs_per_step, plan.num_packs)]
    sizes = np.diff(ends)
    full = sizes[: plan.num_packs // plan.packs_per_step]
    sizes = full if len(full) else sizes
    return PlanReport(
        samples=len(plan.tokens),
        tokens=tokens,
        tiles=int(plan.tiles.sum()),
        packs=plan.num_packs,
        steps=plan.num_steps,
        packs_per_step=plan.packs_per_step,
        capacity=plan.capacity,
        ranks=world_size,
        efficiency=efficiency,
        bound=max(bound, efficiency),
        straggler=1 / utilisation,
        utilisation=utilisation,
        idle_places=-plan.packs_per_step % world_size,
        batch_size=plan.batch_size,
        samples_per_step_min=int(sizes.min()),
        samples_per_step_mean=float(sizes.mean()),
        samples_per_step_max=int(sizes.max()),
        advice=tuple(_advise(plan, world_size, bound, float(sizes.mean()))),
    )


def assign(plan: Plan, world_size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    raise NotImplementedError
