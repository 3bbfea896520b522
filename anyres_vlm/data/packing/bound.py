"""A proven upper bound on packing efficiency, from the histogram of lengths.

The bound is the linear programme of the cutting-stock problem (Gilmore and Gomory, 1961). A pattern is a multiset of
lengths that fits into a pack; the programme chooses how often to use each pattern so that all samples are covered by as
few packs as possible. Its dual assigns each length a price such that no pattern is worth more than 1. Every pack is a
pattern, so any packing needs at least as many packs as all samples together are worth. That holds for any prices after
dividing them by the worth of the most valuable pattern (Farley, 1990), which a knapsack by dynamic programming finds.
The bound is therefore valid even if the programme is not solved to optimality.

Lengths are rounded down to a few classes in whole units of 1/(U + 1) of the capacity, exact multiples to the next lower
one, and a pattern may have U units. The units of a real pack add up to less than U + 1, so it remains a pattern and the
rounding only loosens the bound. Lengths just above 1/2, 1/3, ... of the capacity stay above it (a dual feasible
function; Lueker, 1983) and start classes of their own.

The solver is our own because plans must not depend on a library's version: the prices choose packs (without them,
efficiency at a capacity of 6,144 tokens falls from 0.9003 to 0.8953).
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray

from anyres_vlm.data.packing.fill import Ints

CLASSES = 160  # classes of lengths: takes 0.2 to 0.5 s; many more classes change the bound by less than 0.1%
UNITS = 1020  # units of the capacity; a number with many divisors
EDGES = np.arange(2, 7)  # classes start at these fractions of the capacity: 1/2 to 1/6
PIVOTS = 4000  # largest number of pivots of the simplex method
SHARE = 0.2  # weight of the current prices of the programme in those at which patterns are priced
GAP = 2e-4  # relative gap between the programme's value and the bound at which to stop
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Bound:
    """An upper bound on packing efficiency, and the worth in packs of a sample of at least `lengths[i]` tokens."""

    efficiency: float
    lengths: Ints
    prices: Floats

    def values(self, capacity: int) -> NDArray[np.int32]:
        """Return the worth in tokens of each length from 0 to the capacity: monotone, at most the capacity per pack."""
        table = np.zeros(capacity + 1)
        for length, price in zip(self.lengths, np.maximum.accumulate(self.prices), strict=True):
            table[length:] = price
        return np.floor(table * capacity).astype(np.int32)


def bound_efficiency(tokens: NDArray[np.integer], capacity: int, classes: int = CLASSES) -> Bound:
    """Return an upper bound on tokens / (packs * capacity) over all packings; `tokens` are from 1 to `capacity`.

    The number of packs is rounded up to an integer, which matters for few samples.
    """
    parts = min(UNITS, capacity + 1)
    histogram = np.bincount(tokens)
    lengths = np.flatnonzero(histogram)
    counts = histogram[lengths]
    units = (lengths * parts - 1) // capacity
    starts = np.flatnonzero(np.diff(units, prepend=-1))
    demand = np.add.reduceat(counts, starts).astype(np.float64)
    units = units[starts]
    if units[0] == 0:  # shorter than a unit: worth 0 in the bound
        units, demand = units[1:], demand[1:]
    total = int(np.dot(lengths, counts))
    fewest = -(-total // capacity)
    if len(units) == 0:
        return Bound(total / (fewest * capacity), np.zeros(0, np.int64), np.zeros(0))
    groups = _group(units, demand, parts, classes)
    units, demand = units[groups], np.add.reduceat(demand, groups)
    packs, prices = _solve(units, demand, parts - 1, PIVOTS)
    fewest = max(fewest, int(np.ceil(packs - 1e-6 * max(packs, 1.0))))
    return Bound(min(total / (fewest * capacity), 1.0), units * capacity // parts + 1, prices)


def _group(units: Ints, demand: Floats, parts: int, classes: int) -> Ints:
    """Return first indices of at most `classes` classes that lose about equally much by rounding down."""
    if len(units) <= classes:
        return np.arange(len(units))
    low, high = 0.0, float((units * demand).sum())
    groups = np.zeros(classes, np.int64)
    edges = np.zeros(len(units) + 1, np.bool_)
    edges[np.searchsorted(units, parts // EDGES)] = classes > len(EDGES)
    for _ in range(30):
        middle = (low + high) / 2
        if _classify(units, demand, edges, middle, groups) > classes:
            low = middle
        else:
            high = middle
    return groups[: _classify(units, demand, edges, high, groups)]


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _classify(units: Ints, demand: Floats, edges: NDArray[np.bool_], most_lost: float, groups: Ints) -> int:
    """Form classes greedily, each losing at most `most_lost`. Returns their number, or one more than fit."""
    count, lost = 0, 0.0
    for index in range(len(units)):
        more = lost + demand[index] * (units[index] - units[groups[count - 1]]) if count else 0.0
        if count == 0 or edges[index] or more > most_lost:
            if count == len(groups):
                return count + 1
            groups[count] = index
            count += 1
            more = 0.0
        lost = more
    return count


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _solve(units: Ints, demand: Floats, capacity: int, pivots: int) -> tuple[float, Floats]:
    """Return a proven least number of packs, and prices in packs, by column generation with the revised simplex method.

    Patterns are priced at a mixture of the programme's prices and the best proven ones, which takes a fraction of the
    pivots (Wentges, 1997). If that finds no improving pattern, the programme's prices are used.
    """
    count = len(units)
    inverse, used, weight = np.zeros((count, count)), np.zeros(count), np.ones(count)
    for index in range(count):
        inverse[index, index] = 1.0 / (capacity // units[index])
        used[index] = demand[index] * inverse[index, index]
    prices, best_prices, pattern, best = np.zeros(count), np.zeros(count), np.zeros(count), 0.0
    for _ in range(pivots):
        prices[:] = 0.0
        for index in range(count):
            if weight[index] > 0:
                prices += inverse[index]
        lowest = np.argmin(prices)
        if prices[lowest] < -1e-9:  # more of this length than needed
            pattern[:] = 0.0
            pattern[lowest] = -1.0
            if not _enter(inverse, used, weight, pattern, 0.0):
                break
            continue
        worth = 0.0
        for share in (SHARE if best > 0 else 1.0, 1.0):
            mixed = np.maximum(share * prices + (1 - share) * best_prices, 0.0)
            highest = _best_pattern(units, mixed, capacity, pattern)
            packs = 0.0
            for index in range(count):
                packs += mixed[index] * demand[index]
            if packs / highest > best:
                best = packs / highest
                best_prices[:] = mixed / highest
            if (used * weight).sum() <= best * (1 + GAP):
                return best, best_prices
            worth = 0.0
            for index in range(count):
                worth += prices[index] * pattern[index]
            if worth > 1 + 1e-9:
                break
        if worth <= 1 + 1e-9 or not _enter(inverse, used, weight, pattern, 1.0):
            break
    return best, best_prices


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _best_pattern(units: Ints, prices: Floats, capacity: int, pattern: Floats) -> float:
    """Return the worth of the most valuable pattern and write it to `pattern`: an unbounded knapsack."""
    worth, last = np.zeros(capacity + 1), np.full(capacity + 1, -1)
    for index in range(len(units)):
        if prices[index] <= 0:
            continue
        for size in range(units[index], capacity + 1):
            more = worth[size - units[index]] + prices[index]
            if more > worth[size] + 1e-12:
                worth[size], last[size] = more, index
    pattern[:] = 0
    size = capacity
    while last[size] >= 0:
        pattern[last[size]] += 1
        size -= units[last[size]]
    return float(worth[capacity])


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _enter(inverse: Floats, used: Floats, weight: Floats, pattern: Floats, packs: float) -> bool:
    """Bring a pattern that uses this many packs into the basis. Returns False if no other pattern can leave it."""
    count = len(used)
    leaving, step = -1, np.inf
    direction = np.zeros(count)
    for index in range(count):
        for other in range(count):
            direction[index] += inverse[index, other] * pattern[other]
        if direction[index] > 1e-9 and used[index] < step * direction[index]:
            leaving, step = index, used[index] / direction[index]
    if leaving < 0:
        return False
    used[:] = np.maximum(used - step * direction, 0.0)
    used[leaving], weight[leaving] = step, packs
    inverse[leaving] /= direction[leaving]
    for index in range(count):
        if index != leaving and direction[index] != 0.0:
            inverse[index] -= direction[index] * inverse[leaving]
    return True
