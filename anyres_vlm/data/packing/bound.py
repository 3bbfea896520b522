"""How full packs can be at best: a proven bound from the histogram of lengths.

The bound is the linear programme of cutting stock (Gilmore and Gomory, 1961): choose how often each pattern, a multiset
of lengths that fits a pack, is used, so that every length is used often enough and as few packs as possible are. Its
dual gives each length a price such that no pattern is worth more than 1; then any packing needs at least as many packs
as all samples together are worth, for each pack is a pattern. That holds for any prices once they are divided by the
worth of the dearest pattern (Farley, 1990), and a knapsack by dynamic programming finds that one, so the bound is true
whether or not the programme was solved to the end.

Lengths are rounded down to a few classes in whole units, the capacity to whole units: every real pack remains a pattern
then, for a sum of whole units that is not above the capacity is not above its whole units, so that the rounding only
loosens the bound.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

CLASSES = 128  # of lengths: 0.1 s, and within 0.3% of many more
UNITS = 8  # units of the knapsack a class, so that 128 classes have 1,024 of them
PIVOTS = 4000
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
    unit = max(1, capacity // (classes * UNITS))
    histogram = np.bincount(tokens)
    lengths = np.flatnonzero(histogram)
    counts = histogram[lengths]
    units = lengths // unit
    starts = np.flatnonzero(np.diff(units, prepend=-1))
    demand = np.add.reduceat(counts, starts).astype(np.float64)
    units = units[starts]
    if units[0] == 0:  # shorter than a unit: worth nothing in the bound
        units, demand = units[1:], demand[1:]
    total = int(np.dot(lengths, counts))
    fewest = -(-total // capacity)
    if len(units) == 0:
        return Bound(total / (fewest * capacity), np.zeros(0, np.int64), np.zeros(0))
    groups = _group(units, demand, classes)
    units, demand = units[groups], np.add.reduceat(demand, groups)
    packs, prices = _solve(units, demand, capacity // unit, PIVOTS)
    fewest = max(fewest, int(np.ceil(packs - 1e-6 * max(packs, 1.0))))
    return Bound(min(total / (fewest * capacity), 1.0), units * unit, prices)


def _group(units: Ints, demand: Floats, classes: int) -> Ints:
    """First indices of at most so many classes, such that rounding down within them loses about the same in each."""
    low, high = 0.0, float((units * demand).sum())
    if len(units) <= classes:
        return np.arange(len(units))
    groups = np.zeros(classes, np.int64)
    for _ in range(30):
        middle = (low + high) / 2
        if _cut(units, demand, middle, groups) > classes:
            low = middle
        else:
            high = middle
    return groups[: _cut(units, demand, high, groups)]


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _cut(units: Ints, demand: Floats, most_lost: float, groups: Ints) -> int:
    """Greedy classes that lose at most so much each; their number, or one more than `groups` holds."""
    count, lost = 0, 0.0
    for index in range(len(units)):
        more = lost + demand[index] * (units[index] - units[groups[count - 1]]) if count else 0.0
        if count == 0 or more > most_lost:
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
def _solve(units: Ints, demand: Floats, capacity: int, pivots: int) -> tuple[float, Floats]:
    """Column generation by the revised simplex method. The least number of packs, proven, and prices in packs."""
    count = len(units)
    inverse, used = np.zeros((count, count)), np.zeros(count)
    for index in range(count):
        inverse[index, index] = 1.0 / (capacity // units[index])
        used[index] = demand[index] * inverse[index, index]
    prices, best_prices, pattern, best = np.zeros(count), np.zeros(count), np.zeros(count), 0.0
    for _ in range(pivots):
        prices[:] = 0.0
        for index in range(count):
            prices += inverse[index]
        prices[:] = np.maximum(prices, 0.0)
        dearest = _dearest(units, prices, capacity, pattern)
        packs = 0.0
        for index in range(count):
            packs += prices[index] * demand[index]
        if packs / dearest > best:
            best = packs / dearest
            best_prices[:] = prices / dearest
        if used.sum() <= best * (1 + GAP):
            break
        leaving, step = -1, np.inf
        direction = np.zeros(count)
        for index in range(count):
            for other in range(count):
                direction[index] += inverse[index, other] * pattern[other]
            if direction[index] > 1e-9 and used[index] < step * direction[index]:
                leaving, step = index, used[index] / direction[index]
        if leaving < 0:
            break
        used[:] = np.maximum(used - step * direction, 0.0)
        used[leaving] = step
        inverse[leaving] /= direction[leaving]
        for index in range(count):
            if index != leaving and direction[index] != 0.0:
                inverse[index] -= direction[index] * inverse[leaving]
    return best, best_prices
