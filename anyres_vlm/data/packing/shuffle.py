"""Compiled kernels that shuffle the samples of an epoch."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

Int = Any  # of Python or numpy; compiled code makes no difference
Ints = NDArray[np.int64]


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def shuffle(count: Int, seed: np.uint64) -> NDArray[np.int32]:
    """Shuffle by Fisher-Yates with splitmix64: the same order on every machine and with every numpy version."""
    order = np.arange(count).astype(np.int32)
    state = seed
    for last in range(count - 1, 0, -1):
        state += np.uint64(0x9E3779B97F4A7C15)
        mixed = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
        other = ((mixed >> np.uint64(32)) * np.uint64(last + 1)) >> np.uint64(32)
        order[last], order[other] = order[other], order[last]
    return order


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def gather(
    order: NDArray[np.int32], tokens: Ints, tiles: Ints, square: Int, tile: Int
) -> tuple[NDArray[np.int32], Ints]:
    """Return lengths, and costs beyond the length in 1/1024 token, in the shuffled order.

    `square` is the cost of a squared token in 2**-30 tokens, `tile` that of a tile in 1/1024 token.
    """
    length = np.empty(len(order), np.int32)
    extra = np.empty(len(order), np.int64)
    for place in range(len(order)):
        size = tokens[order[place]]
        length[place] = size
        extra[place] = (size * size * square >> 20) + tiles[order[place]] * tile
    return length, extra
