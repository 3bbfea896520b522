"""Compiled kernels that distribute each kind of pack evenly over a few neighbouring steps.

A kind of pack is, for example, two images, or one image and a text. If few samples fit a pack, a step may by chance get
too many packs of a kind, so its mean length and share of text deviate more than those of randomly drawn samples. To
even this out, the packs of a block of n steps are sorted by kind and cost, and each run of n packs gives one pack to
each step, in the order in which they were filled. Blocks are no longer than needed: if steps varied less than in random
order, the slow drifts of a random order would stand out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from anyres_vlm.data.packing.fill import UNIT

Int = Any  # of Python or numpy; compiled code makes no difference
Ints = NDArray[np.int64]

MOST_STEPS = 4  # per block
MOST_VARIANCE = 1.2  # allowed variance of the means of steps, relative to random order
BITS = 21  # in a sort key for a number of samples or a cost in tokens


class Moments(NamedTuple):
    """Mean and variance of the lengths, and the share of text-only samples."""

    length: float
    variance: float
    text: float


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def measure_moments(tokens: Ints, tiles: Ints) -> Moments:
    """Measure all samples."""
    total, squares, texts = 0.0, 0.0, 0
    for sample in range(len(tokens)):
        length = float(tokens[sample])
        total += length
        squares += length * length
        texts += tiles[sample] == 0
    mean = total / len(tokens)
    return Moments(mean, squares / len(tokens) - mean * mean, texts / len(tokens))


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def miss(length: Int, texts: Int, samples: Int, moments: Moments) -> float:
    """Return the squared deviation of mean length or share of text, the larger, relative to its random variance."""
    if samples == 0:
        return 0.0
    text_variance = moments.text * (1 - moments.text)
    worst = 0.0
    if moments.variance > 1e-6:
        worst = (length / samples - moments.length) ** 2 / moments.variance
    if text_variance > 1e-9:
        worst = max(worst, (texts / samples - moments.text) ** 2 / text_variance)
    return float(worst * samples)


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def count(rows: NDArray[np.int32], starts: Ints, tokens: Ints, tiles: Ints, first: Int, last: Int) -> Ints:
    """Count tokens, text-only samples and samples of packs `first` to `last` - 1. Returns (packs, 3)."""
    counts = np.zeros((last - first, 3), np.int64)
    for pack in range(first, last):
        for place in range(starts[pack], starts[pack + 1]):
            counts[pack - first, 0] += tokens[rows[place]]
            counts[pack - first, 1] += tiles[rows[place]] == 0
        counts[pack - first, 2] = starts[pack + 1] - starts[pack]
    return counts


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def vary(
    rows: NDArray[np.int32], starts: Ints, tokens: Ints, tiles: Ints, per_step: Int, moments: Moments
) -> tuple[float, float]:
    """Return the variances over full steps of mean length and share of text, relative to random order."""
    full = (len(starts) - 1) // per_step
    total = np.zeros(2)
    for step in range(full):
        counts = count(rows, starts, tokens, tiles, step * per_step, (step + 1) * per_step)
        length, texts, samples = counts[:, 0].sum(), counts[:, 1].sum(), counts[:, 2].sum()
        total[0] += miss(length, moments.text * samples, samples, moments)
        total[1] += miss(moments.length * samples, texts, samples, moments)
    return total[0] / max(full, 1), total[1] / max(full, 1)


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def reorder(rows: NDArray[np.int32], starts: Ints, costs: Ints, first: Int, source: Ints) -> None:
    """Reorder the packs from `first` on to the order of `source`, in place."""
    old_starts, old_costs = starts[first : first + len(source) + 1].copy(), costs[first : first + len(source)].copy()
    old_rows = rows[old_starts[0] : old_starts[-1]].copy()
    done: Int = old_starts[0]
    for index in range(len(source)):
        pack = source[index]
        costs[first + index] = old_costs[pack]
        for place in range(old_starts[pack] - old_starts[0], old_starts[pack + 1] - old_starts[0]):
            rows[done] = old_rows[place]
            done += 1
        starts[first + index + 1] = done


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def spread_blocks(
    rows: NDArray[np.int32], starts: Ints, costs: Ints, tokens: Ints, tiles: Ints, per_step: Int, most_steps: Int
) -> None:
    """Reorder the packs within blocks of `most_steps` full steps, in place."""
    full = len(costs) // per_step
    for step in range(0, full, most_steps):
        steps = min(most_steps, full - step)
        first, last = step * per_step, (step + steps) * per_step
        counts, cost = count(rows, starts, tokens, tiles, first, last), costs[first:last]
        kinds = ((counts[:, 1] << BITS | counts[:, 2]) << BITS) | np.minimum(cost // UNIT, (1 << BITS) - 1)
        order, source = np.argsort(kinds, kind="mergesort"), np.empty(last - first, np.int64)
        for place in range(per_step):
            source[place::per_step] = np.sort(order[place * steps : (place + 1) * steps])
        reorder(rows, starts, costs, first, source)


def spread(
    rows: NDArray[np.int32], starts: Ints, costs: Ints, tokens: Ints, tiles: Ints, per_step: int, moments: Moments
) -> None:
    """Reorder packs in place until mean length and share of text vary over steps about as in random order."""
    for steps in range(2, MOST_STEPS + 1):
        if max(vary(rows, starts, tokens, tiles, per_step, moments)) <= MOST_VARIANCE:
            return
        spread_blocks(rows, starts, costs, tokens, tiles, per_step, steps)
