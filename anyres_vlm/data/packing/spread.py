"""Compiled kernels that spread the packs of a few neighbouring steps over them, kind by kind.

Packs come in kinds, such as two images, or one and a text; where few samples fit a pack, chance gives a step too many
of a kind, and with it another mean length and share of text than its samples would have had in random order. So that
each step gets its part, the packs of a block of steps are sorted by kind and cost, and of as many neighbours as there
are steps each step gets one, in the order in which they were filled. No more than needed: what varies less than in
random order from step to step makes the slow drifts of a random order stand out.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from anyres_vlm.data.packing.fill import UNIT

Int = Any  # Python's or numpy's: compiled, there is no difference
Ints = NDArray[np.int64]

MOST_STEPS = 4  # of a block
MOST_VARIANCE = 1.2  # of the means of steps, in units of that in random order
BITS = 21  # of a number of samples or of a cost in tokens, within a key


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def vary(rows: NDArray[np.int32], starts: Ints, tokens: Ints, tiles: Ints, per_step: Int) -> float:
    """How much full steps vary in mean length, or in share of text-only samples, over what they do in random order."""
    full = (len(starts) - 1) // per_step
    sums, squares, means = np.zeros(2), np.zeros(2), np.zeros((full, 2))
    for step in range(full):
        first, last = starts[step * per_step], starts[(step + 1) * per_step]
        for place in range(first, last):
            length, text = float(tokens[rows[place]]), 1.0 if tiles[rows[place]] == 0 else 0.0
            means[step, 0] += length
            means[step, 1] += text
            squares[0] += length * length
            squares[1] += text
        sums += means[step]
        means[step] /= last - first
    most = 0.0
    samples = starts[full * per_step]
    for which in range(2):
        mean = sums[which] / samples
        variance = squares[which] / samples - mean * mean
        if full > 1 and variance > 1e-9:
            most = max(most, ((means[:, which] - mean) ** 2).sum() / full * (samples / full) / variance)
    return most


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def list_kinds(rows: NDArray[np.int32], starts: Ints, costs: Ints, tiles: Ints, first: Int, kinds: Ints) -> None:
    """Write the sort keys of the packs from `first` on to `kinds`: text-only samples, samples, cost."""
    for index in range(len(kinds)):
        start, end = starts[first + index], starts[first + index + 1]
        texts: Int = np.int64(0)
        for place in range(start, end):
            texts += tiles[rows[place]] == 0
        kinds[index] = ((texts << BITS | (end - start)) << BITS) | min(costs[first + index] // UNIT, (1 << BITS) - 1)


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def spread_blocks(
    rows: NDArray[np.int32], starts: Ints, costs: Ints, tiles: Ints, per_step: Int, most_steps: Int
) -> None:
    """Reorder the packs within blocks of so many full steps, in place."""
    full = len(costs) // per_step
    for step in range(0, full, most_steps):
        steps = min(most_steps, full - step)
        first, count = step * per_step, steps * per_step
        kinds = np.empty(count, np.int64)
        list_kinds(rows, starts, costs, tiles, first, kinds)
        order = np.argsort(kinds, kind="mergesort")
        source = np.empty(count, np.int64)
        for place in range(per_step):
            source[place::per_step] = np.sort(order[place * steps : (place + 1) * steps])
        old_starts, old_costs = starts[first : first + count + 1].copy(), costs[first : first + count].copy()
        old_rows = rows[old_starts[0] : old_starts[-1]].copy()
        done: Int = old_starts[0]
        for index in range(count):
            pack = source[index]
            costs[first + index] = old_costs[pack]
            for place in range(old_starts[pack] - old_starts[0], old_starts[pack + 1] - old_starts[0]):
                rows[done] = old_rows[place]
                done += 1
            starts[first + index + 1] = done


def spread(rows: NDArray[np.int32], starts: Ints, costs: Ints, tokens: Ints, tiles: Ints, per_step: int) -> None:
    """Reorder packs in place until the steps' mean lengths and shares of text vary about as in random order."""
    for steps in range(2, MOST_STEPS + 1):
        if vary(rows, starts, tokens, tiles, per_step) <= MOST_VARIANCE:
            return
        spread_blocks(rows, starts, costs, tiles, per_step, steps)
