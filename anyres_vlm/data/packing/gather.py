"""Compiled kernels that gather the dearest packs of a few neighbouring steps in one of them.

Where tiles are dear, a few packs cost more than the others whatever is done, as those of one image more. A step with
one of them waits as long as a step with twenty, so twenty of them are gathered in one step of a block, exchanged for
others: those steps wait no more. They go where they disturb the randomness least, and only as many as leave the step's
mean length and share of text what random order might give.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from anyres_vlm.data.packing.spread import Moments, count, miss, reorder

Int = Any  # Python's or numpy's: compiled, there is no difference
Ints = NDArray[np.int64]

STEPS = 8  # of a block
MOST_MISS = 4.0  # of a step that gathers, in variances of random order
GAIN = 300  # gathering is worth it for a 300th of the cost


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def choose_dear(counts: Ints, costs: Ints, per_step: Int, moments: Moments) -> tuple[Ints, Int]:
    """The packs of a block that one step should hold, none if there is no gain, and that step."""
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
def exchange(dear: Ints, home: Int, per_step: Int, packs: Int) -> Ints:
    """The packs of a block in their new order: the dear ones elsewhere change places with others of the home step."""
    source, is_dear = np.arange(packs), np.zeros(packs, np.bool_)
    is_dear[dear] = True
    first = home * per_step
    others = first + np.flatnonzero(~is_dear[first : first + per_step])
    away = np.sort(dear[dear // per_step != home])
    for index in range(len(away)):
        other = others[index * len(others) // len(away)]
        source[away[index]], source[other] = other, away[index]
    return source


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def gather_dear(
    rows: NDArray[np.int32], starts: Ints, costs: Ints, tokens: Ints, tiles: Ints, per_step: Int, moments: Moments
) -> None:
    """Gather dear packs within each block of full steps, in place."""
    full = len(costs) // per_step
    for step in range(0, full, STEPS):
        first, last = step * per_step, min(step + STEPS, full) * per_step
        counts = count(rows, starts, tokens, tiles, first, last)
        dear, home = choose_dear(counts, costs[first:last], per_step, moments)
        if len(dear):
            reorder(rows, starts, costs, first, exchange(dear, home, per_step, last - first))
