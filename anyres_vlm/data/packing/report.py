"""Report on a plan: efficiency and its bound, stragglers at a number of ranks, samples per step, and advice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from anyres_vlm.data.packing.bound import bound_efficiency
from anyres_vlm.data.packing.plan import Plan

FAIR = 0.98  # if the bound is lower, another capacity is suggested
CAPACITIES = (4096, 6144, 8192, 10_240, 12_288, 16_384, 20_480, 24_576, 32_768)


@dataclass(frozen=True)
class PlanReport:
    """Figures of a plan at a number of ranks.

    `straggler` is the cost of the slowest rank summed over micro-steps, divided by that of the mean rank; `utilisation`
    is its inverse. `idle_places` is the number of (micro-step, rank) places of a full step without a pack. The samples
    per step are those of full steps.
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
    _, ranks = plan.assign(world_size)
    slowest = plan.costs[ranks == 0].sum()  # rank 0 has the most expensive pack of each micro-step
    utilisation = float(plan.costs.sum() / (world_size * slowest))
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


def _advise(plan: Plan, world_size: int, bound: float, samples_per_step: float) -> Iterator[str]:
    """Yield sentences on what to change."""
    packs = plan.packs_per_step
    if packs % world_size:
        around = [
            number for number in (packs // world_size * world_size, -(-packs // world_size) * world_size) if number
        ]
        choices = " or ".join(
            f"--packs-per-step {number} (about {samples_per_step * number / packs:.0f} samples)" for number in around
        )
        places = around[-1]
        yield (
            f"{packs} packs per step do not divide evenly over {world_size} ranks: {places - packs} of {places} places "
            f"stay idle; try {choices}, or a number of ranks that divides {packs}"
        )
    if abs(samples_per_step / plan.batch_size - 1) > 0.1 and plan.num_steps > 1:
        yield (
            f"a step has {samples_per_step:.0f} samples, {samples_per_step / plan.batch_size - 1:+.0%} from the batch "
            f"size of {plan.batch_size}: use a smaller capacity or another --packs-per-step to get closer"
        )
    if bound < FAIR:
        better = _better_capacity(plan, bound)
        remedy = (
            f"--capacity {better[0]} allows {better[1]:.1%}" if better else "no capacity up to 32,768 is much better"
        )
        yield f"no plan fills packs of {plan.capacity:,} tokens above {bound:.1%} with these lengths: {remedy}"


def _better_capacity(plan: Plan, bound: float) -> tuple[int, float] | None:
    """Return the smallest larger capacity with a fair bound, else the best one if it gains at least 0.01."""
    best = None
    for capacity in CAPACITIES:
        if capacity > plan.capacity:
            found = bound_efficiency(plan.tokens, capacity, classes=64).efficiency
            if found >= FAIR:
                return capacity, found
            if found > (best[1] if best else bound + 0.01):
                best = capacity, found
    return best
