"""How full packs can be at best: a proven bound from the histogram of lengths.

The bound is the linear programme of cutting stock (Gilmore and Gomory, 1961): choose how often each pattern, a multiset
of lengths that fits a pack, is used, so that every length is used often enough and as few packs as possible are. Its
dual gives each length a price such that no pattern is worth more than 1; then any packing needs at least as many packs
as all samples together are worth, for each pack is a pattern. That holds for any prices once they are divided by the
worth of the dearest pattern (Farley, 1990), and a knapsack by dynamic programming finds that one, so the bound is true
whether or not the programme was solved to the end.

Lengths are rounded down to a few classes in whole units of 1/(U + 1) of the capacity, those on a unit to the one below
it, and a pattern may have U units: the units of a real pack are fewer than U + 1, so that it remains a pattern and the
rounding only loosens the bound. What is longer than a half or a third of the capacity stays so (a dual feasible
function; Lueker, 1983), and such lengths start classes of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

CLASSES = 160  # of lengths: 0.2 to 0.5 s, and within 0.1% of many more
UNITS = 1020  # of the capacity: many numbers divide it
EDGES = np.arange(2, 7)  # parts of the capacity at which classes start
PIVOTS = 4000
SHARE = 0.2  # of the programme's prices in those that patterns are priced at
GAP = 2e-4  # between the programme's value and the bound


@dataclass(frozen=True)
class Bound:
    """An upper bound on packing efficiency, and what a sample of at least `lengths[i]` tokens is worth in packs."""

    efficiency: float
    lengths: Ints
    prices: Floats

    def values(self, capacity: int) -> NDArray[np.int32]:
        """Worth of each length from 0 to the capacity, in tokens: never falling, at most the capacity in any pack."""
        table = np.zeros(capacity + 1)
        for length, price in zip(self.lengths, np.maximum.accumulate(self.prices), strict=True):
            table[length:] = price
        return np.floor(table * capacity).astype(np.int32)


def bound_efficiency(tokens: NDArray[np.integer], capacity: int, classes: int = CLASSES) -> Bound:
    """An upper bound on tokens / (packs * capacity) over all packings of these samples; lengths from 1 to `capacity`.

    For few samples the number of packs is rounded up, as there are only whole ones.
    """
    parts = min(UNITS, capacity + 1)
    histogram = np.bincount(tokens)
    lengths = np.flatnonzero(histogram)
    counts = histogram[lengths]
    units = (lengths * parts - 1) // capacity
    starts = np.flatnonzero(np.diff(units, prepend=-1))
    demand = np.add.reduceat(counts, starts).astype(np.float64)
    units = units[starts]
    if units[0] == 0:  # shorter than a unit: worth nothing in the bound
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
    """First indices of at most so many classes, such that rounding down within them loses about the same in each."""
    low, high = 0.0, float((units * demand).sum())
    if len(units) <= classes:
        return np.arange(len(units))
    groups = np.zeros(classes, np.int64)
    edges = np.zeros(len(units) + 1, np.bool_)
    edges[np.searchsorted(units, parts // EDGES)] = classes > len(EDGES)
    for _ in range(30):
        middle = (low + high) / 2
        if _cut(units, demand, edges, middle, groups) > classes:
            low = middle
        else:
            high = middle
    return groups[: _cut(units, demand, edges, high, groups)]


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _cut(units: Ints, demand: Floats, edges: NDArray[np.bool_], most_lost: float, groups: Ints) -> int:
    """Greedy classes that start at the edges and lose at most so much each; their number, or one more than fits."""
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
def _dearest(units: Ints, prices: Floats, capacity: int, pattern: Floats) -> float:
    """The worth of the dearest pattern, itself written to `pattern`: an unbounded knapsack."""
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
    """Bring a pattern of so many packs into the basis; False if none can leave."""
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


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _solve(units: Ints, demand: Floats, capacity: int, pivots: int) -> tuple[float, Floats]:
    """Column generation by the revised simplex method. The least number of packs, proven, and prices in packs.

    Patterns are priced between the programme's prices and the best proven ones, which takes a fraction of the pivots
    (Wentges, 1997); where that finds no pattern that helps, at the programme's.
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
        if prices[lowest] < -1e-9:  # more of these than are needed
            pattern[:] = 0.0
            pattern[lowest] = -1.0
            if not _enter(inverse, used, weight, pattern, 0.0):
                break
            continue
        worth = 0.0
        for share in (SHARE if best > 0 else 1.0, 1.0):
            mixed = np.maximum(share * prices + (1 - share) * best_prices, 0.0)
            dearest = _dearest(units, mixed, capacity, pattern)
            packs = 0.0
            for index in range(count):
                packs += mixed[index] * demand[index]
            if packs / dearest > best:
                best = packs / dearest
                best_prices[:] = mixed / dearest
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
