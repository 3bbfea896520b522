"""Compiled kernels that balance the costs of a step's packs by exchanging samples between them.

Packs are filled one by one. If tiles are expensive, a few packs of a step end up a tile or two above the others, and
every micro-step waits for its most expensive pack. Here the most expensive pack exchanges one or two samples for up to
two of a cheap pack, as long as both stay within the capacity and the higher of the two costs falls. Each step keeps its
samples, so neither efficiency nor randomness changes.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from anyres_vlm.data.packing.fill import UNIT

Int = Any  # of Python or numpy; compiled code makes no difference
Ints = NDArray[np.int64]

PARTNERS = 12  # number of cheapest packs to try an exchange with
MEMBERS = 12  # number of samples of a pack that may be exchanged
SUBSETS = 1 + MEMBERS * (MEMBERS + 1) // 2
TOLERANCE = 250  # a step is balanced when its highest cost is within 1/250 of the mean


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def list_subsets(members: Ints, size: Ints, price: Ints, subsets: Ints) -> Int:
    """Write (tokens, cost, first, second) of all subsets of up to two members, first the empty one; -1: no member."""
    subsets[0] = np.array((0, 0, -1, -1))
    found = 1
    for one in range(min(len(members), MEMBERS)):
        for two in range(-1, one):
            subsets[found, 0], subsets[found, 1] = size[members[one]], price[members[one]]
            if two >= 0:
                subsets[found, 0] += size[members[two]]
                subsets[found, 1] += price[members[two]]
            subsets[found, 2], subsets[found, 3] = members[one], -1 if two < 0 else members[two]
            found += 1
    return found


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def improve(size: Ints, price: Ints, pack: Ints, load: Ints, cost: Ints, capacity: Int) -> bool:
    """Make the best exchange for the most expensive pack. `size`, `price`, `pack` are per sample, the rest per pack."""
    worst = np.argmax(cost)
    mine, theirs = np.empty((SUBSETS, 4), np.int64), np.empty((SUBSETS, 4), np.int64)
    many = list_subsets(np.flatnonzero(pack == worst), size, price, mine)
    best, partner = cost[worst] - cost[worst] // 2048, -1
    give, take = np.zeros(4, np.int64), np.zeros(4, np.int64)
    for other in np.argsort(cost, kind="mergesort")[:PARTNERS]:
        if other == worst:
            continue
        few = list_subsets(np.flatnonzero(pack == other), size, price, theirs)
        for one in range(1, many):
            for two in range(few):
                more = mine[one, 0] - theirs[two, 0]
                if load[other] + more > capacity or load[worst] - more > capacity:
                    continue
                shift = mine[one, 1] - theirs[two, 1]
                higher = max(cost[worst] - shift, cost[other] + shift)
                if higher < best:
                    best, partner = higher, other
                    give[:], take[:] = mine[one], theirs[two]
    if partner < 0:
        return False
    for side, target, sign in ((give, partner, 1), (take, worst, -1)):
        load[partner] += sign * side[0]
        load[worst] -= sign * side[0]
        cost[partner] += sign * side[1]
        cost[worst] -= sign * side[1]
        for index in side[2:]:
            if index >= 0:
                pack[index] = target
    return True


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def even_out(
    rows: NDArray[np.int32],
    starts: Ints,
    costs: Ints,
    tokens: Ints,
    tiles: Ints,
    square: Int,
    tile: Int,
    capacity: Int,
    per_step: Int,
) -> None:
    """Exchange samples within each step, in place, until it is balanced or cannot be improved."""
    for first in range(0, len(costs), per_step):
        last = min(first + per_step, len(costs))
        cost = costs[first:last]
        goal = cost.sum() // len(cost) * (TOLERANCE + 1) // TOLERANCE
        if cost.max() <= goal or last == first + 1:
            continue
        ids = rows[starts[first] : starts[last]].copy()
        size, price = np.empty(len(ids), np.int64), np.empty(len(ids), np.int64)
        for index in range(len(ids)):
            size[index] = tokens[ids[index]]
            price[index] = size[index] * UNIT + (size[index] ** 2 * square >> 20) + tiles[ids[index]] * tile
        pack, load = np.empty(len(ids), np.int64), np.zeros(len(cost), np.int64)
        for number in range(len(cost)):
            for index in range(starts[first + number] - starts[first], starts[first + number + 1] - starts[first]):
                pack[index] = number
                load[number] += size[index]
        tries: Int = len(cost)
        while tries > 0 and cost.max() > goal and improve(size, price, pack, load, cost, capacity):
            tries -= 1
        done: Int = starts[first]
        for number in range(len(cost)):
            for member in np.flatnonzero(pack == number):
                rows[done] = ids[member]
                done += 1
            starts[first + number + 1] = done
