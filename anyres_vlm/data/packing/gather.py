"""Compiled kernels that gather the most expensive packs of a few neighbouring steps into one step.

If tiles are expensive, a few packs inevitably cost more than the others, such as those with one more image. A step with
one of them waits as long as a step with twenty. So within a block of steps, these packs are exchanged for others such
that one step holds them all and the other steps no longer wait. The step is chosen to disturb randomness least, and
takes only as many as keep its mean length and share of text within what a random order may give.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from anyres_vlm.data.packing.spread import Moments, count, miss, reorder

Int = Any  # of Python or numpy; compiled code makes no difference
Ints = NDArray[np.int64]

STEPS = 8  # per block
MOST_MISS = 4.0  # largest deviation of the gathering step, in variances of a random order
GAIN = 300  # gather only if it saves at least 1/300 of the cost


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def choose_expensive(counts: Ints, costs: Ints, per_step: Int, moments: Moments) -> tuple[Ints, Int]:
    """Return the packs of a block that one step should hold, none if nothing is gained, and that step."""
    order = np.argsort(-costs, kind="mergesort")
    steps = len(costs) // per_step
    whole, inside, number = np.zeros((steps, 3)), np.zeros((steps, 3)), np.zeros(steps, np.int64)
    for pack in range(len(costs)):
        whole[pack // per_step] += counts[pack]
    homes = np.full(per_step + 1, -1)
    for many in range(1, per_step):
        pack = order[many - 1]
        inside[pack // per_step] += counts[pack]
        number[pack // per_step] += 1
        least = MOST_MISS
        for step in range(steps):
            kept = (per_step - many) / max(per_step - number[step], 1)
            held = inside.sum(axis=0) + (whole[step] - inside[step]) * kept
            off = miss(held[0], held[1], held[2], moments)
            if off <= least:
                least, homes[many] = off, step
    for many in range(per_step - 1, 0, -1):
        rest = costs[order[many]]
        if homes[many] >= 0 and costs[order[many - 1]] > rest + rest // (4 * GAIN):
            if costs[order[0]] - rest < rest // GAIN:
                break
            return order[:many], homes[many]
    return order[:0], -1


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def exchange(expensive: Ints, home: Int, per_step: Int, packs: Int) -> Ints:
    """Return the new order of a block: expensive packs elsewhere swap places with other packs of the home step."""
    source, is_expensive = np.arange(packs), np.zeros(packs, np.bool_)
    is_expensive[expensive] = True
    first = home * per_step
    others = first + np.flatnonzero(~is_expensive[first : first + per_step])
    away = np.sort(expensive[expensive // per_step != home])
    for index in range(len(away)):
        other = others[index * len(others) // len(away)]
        source[away[index]], source[other] = other, away[index]
    return source


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def gather_dear(
    rows: NDArray[np.int32], starts: Ints, costs: Ints, tokens: Ints, tiles: Ints, per_step: Int, moments: Moments
) -> None:
    """Gather expensive packs within each block of full steps, in place."""
    full = len(costs) // per_step
    for step in range(0, full, STEPS):
        first, last = step * per_step, min(step + STEPS, full) * per_step
        counts = count(rows, starts, tokens, tiles, first, last)
        expensive, home = choose_expensive(counts, costs[first:last], per_step, moments)
        if len(expensive):
            reorder(rows, starts, costs, first, exchange(expensive, home, per_step, last - first))
