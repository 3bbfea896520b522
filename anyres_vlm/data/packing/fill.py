"""Compiled kernels that fill packs one by one from a small buffer over the shuffled samples.

The buffer holds the next samples of the shuffled order, sorted by length. Each pack first takes the oldest sample of
the buffer, so no sample waits for more packs than the buffer has samples; then more of the oldest ones, chosen among a
few by their cost. It ends with the best combination of up to four samples: up to two of the oldest ones and the best
pair for the remaining room, found with two pointers. This is repeated while a short sample still fits. No sample moves
further than the buffer reaches, so the order of lengths stays as random as the shuffle.

All arithmetic is on integers. Lengths and prices are in tokens; costs are in 1/1024 token (`UNIT`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

UNIT = 1024  # cost units per token
AGES = 8  # number of oldest samples to choose from by cost while a pack is far from full
CANDIDATES = 6  # number of oldest samples to try as the last ones of a pack
LIMIT = np.int64(1) << 60  # above any score
SHIFT = 32  # a key of the buffer is length << 32 | position in the shuffled order
MASK = (1 << SHIFT) - 1
# Indices of the state: keys in the buffer, next sample to load, oldest sample in the buffer, next sample to count for
# the due cost, samples placed, running mean score, tokens loaded, tokens and extra cost counted, tokens and extra cost
# placed.
COUNT, HEAD, OLDEST, AHEAD, DONE, SCORE, FED, SEEN, SEEN_EXTRA, PLACED, PLACED_EXTRA = range(11)

Int = Any  # an integer of Python or numpy; compiled code accepts both
Ints = NDArray[np.int64]
Rows = NDArray[np.int32]


class Strategy(NamedTuple):
    """Parameters of filling. A score is a number of lost tokens times `weight`; see `best_pair`."""

    width: int  # samples in the buffer
    near: int  # tenths of a mean length; with less room than this, the last samples of a pack are searched
    pairs: int  # number of oldest samples that are also tried in pairs
    weight: int  # score of a lost token
    over: int  # scale for a cost above the goal
    under: int  # scale for a cost below the goal
    most: int  # largest score for a cost that misses the goal
    accept: int  # score at which a search ends
    relax: int  # sixteenths of the running mean score at which it also ends
    expected: int  # expected efficiency, in 1/1024


class Samples(NamedTuple):
    """In shuffled order, (N,) each: tokens, cost beyond the tokens, worth in tokens, and whether already in a pack."""

    length: Rows
    extra: Ints
    value: Rows
    used: NDArray[np.uint8]


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def fill(
    length: Rows, extra: Ints, value: Rows, capacity: Int, per_step: Int, strategy: Strategy
) -> tuple[Rows, Ints, Ints, Int, Int]:
    """Fill packs until no sample is left. `length`, `extra` and `value` (N,) are in the shuffled order.

    Returns the positions of the samples in the order of their packs (N,), the start of each pack in them (packs + 1,),
    the cost of each pack in 1/1024 token (packs,), and the numbers of packs and tokens placed when the last sample was
    loaded into the buffer.
    """
    total = len(length)
    # Unwritten pages of the last two arrays take no memory.
    positions, starts, costs = np.empty(total, np.int32), np.empty(total + 1, np.int64), np.empty(total, np.int64)
    starts[0] = 0
    samples = Samples(length, extra, value, np.zeros(total, np.uint8))
    keys, state = np.zeros(strategy.width + 2, np.int64), np.zeros(11, np.int64)
    state[COUNT] = 1  # keys[0] stands for no sample
    pack, due, steady_packs, steady_tokens = 0, np.int64(0), 0, np.int64(0)
    while state[DONE] < total:
        if state[HEAD] < total:
            steady_packs, steady_tokens = pack, state[PLACED]
        refill(state, keys, samples, strategy.width)
        if pack % per_step == 0:
            due = due_cost(state, samples, per_step * capacity, capacity * strategy.expected // 1024)
        before = state[PLACED] * UNIT + state[PLACED_EXTRA]
        fill_pack(state, keys, samples, capacity, due, strategy, positions)
        costs[pack] = state[PLACED] * UNIT + state[PLACED_EXTRA] - before
        pack += 1
        starts[pack] = state[DONE]
    if steady_packs == 0:  # too few samples to exclude the end
        steady_packs, steady_tokens = pack, state[PLACED]
    return positions, starts[: pack + 1], costs[:pack], steady_packs, steady_tokens


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def refill(state: Ints, keys: Ints, samples: Samples, width: Int) -> None:
    """Load the next samples until the buffer holds `width`."""
    length, extra = samples.length, samples.extra
    while state[COUNT] <= width and state[HEAD] < len(length):
        head = state[HEAD]
        key = (np.int64(length[head]) << SHIFT) | head
        at = locate(keys, state[COUNT], key)
        for index in range(state[COUNT], at, -1):
            keys[index] = keys[index - 1]
        keys[at] = key
        state[COUNT] += 1
        state[HEAD] += 1
        state[FED] += length[head]
        if state[AHEAD] == head:
            state[AHEAD] += 1
            state[SEEN] += length[head]
            state[SEEN_EXTRA] += extra[head]


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def due_cost(state: Ints, samples: Samples, tokens: Int, expected: Int) -> Int:
    """Return the due cost of a pack of `expected` tokens, at the mean cost of the next samples, `tokens` in total."""
    length, extra = samples.length, samples.extra
    while state[AHEAD] < len(length) and state[SEEN] - state[PLACED] < tokens:
        state[SEEN] += length[state[AHEAD]]
        state[SEEN_EXTRA] += extra[state[AHEAD]]
        state[AHEAD] += 1
    return expected * UNIT + (state[SEEN_EXTRA] - state[PLACED_EXTRA]) * expected // (state[SEEN] - state[PLACED])


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def fill_pack(
    state: Ints, keys: Ints, samples: Samples, capacity: Int, due: Int, strategy: Strategy, positions: Rows
) -> None:
    """Fill one pack and write the shuffled positions of its samples to `positions` from `state[DONE]` on."""
    length, extra, value, used = samples
    room, worth, goal, first = np.int64(capacity), np.int64(capacity), due, True
    score: Int = np.int64(0)
    while state[COUNT] > 1:
        while used[state[OLDEST]]:
            state[OLDEST] += 1
        choice = state[OLDEST]
        if not first:
            if 10 * room * (state[COUNT] - 1) < strategy.near * (state[FED] - state[PLACED]):
                break
            choice = best_next(state, samples, room, goal, due, capacity)
            if choice < 0:
                break
        first = False
        room, worth = room - length[choice], worth - value[choice]
        goal -= length[choice] * UNIT + extra[choice]
        positions[state[DONE]] = choice
        place(state, keys, locate(keys, state[COUNT], (np.int64(length[choice]) << SHIFT) | choice), samples)
    chosen = np.zeros(4, np.int64)
    while state[COUNT] > 1 and room >= keys[1] >> SHIFT:  # again if there is room for a short sample
        accept = max(strategy.accept, (state[SCORE] >> 10) * strategy.relax >> 4)
        score = best_end(keys, state, samples, room, worth, goal, accept, strategy, chosen)
        chosen.sort()
        if chosen[3] == 0:
            break
        for at in chosen[::-1]:  # from the end, so that the other indices stay valid
            if at > 0:
                choice = place(state, keys, at, samples)
                positions[state[DONE] - 1] = choice
                room, worth = room - length[choice], worth - value[choice]
                goal -= length[choice] * UNIT + extra[choice]
    state[SCORE] += (min(score, 100_000) * 1024 - state[SCORE]) >> 6


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def best_next(state: Ints, samples: Samples, room: Int, goal: Int, full: Int, capacity: Int) -> Int:
    """Return the one of the oldest samples that best keeps cost in proportion to length; -1 if none fits."""
    due = goal - room * full // capacity
    best, choice, seen, at = LIMIT, -1, 0, state[OLDEST]
    while seen < AGES and at < state[HEAD]:
        if not samples.used[at]:
            seen += 1
            size = np.int64(samples.length[at])
            if size <= room:
                miss = abs(due - (samples.extra[at] + size * UNIT - size * full // capacity))
                if miss < best:
                    best, choice = miss, at
        at += 1
    return choice


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def best_end(
    keys: Ints,
    state: Ints,
    samples: Samples,
    room: Int,
    worth: Int,
    goal: Int,
    accept: Int,
    strategy: Strategy,
    chosen: Ints,
) -> Int:
    """Write the buffer indices of up to four samples that end a pack to `chosen`, 0 for none. Returns the score."""
    length, extra, value, used = samples
    count = state[COUNT]
    size, gain, cost, where = np.zeros((4, CANDIDATES + 1), np.int64)
    where[0] = -1  # index 0 stands for no sample
    found, at = 1, state[OLDEST]
    while at < state[HEAD] and found <= CANDIDATES:
        if not used[at]:
            size[found], gain[found], cost[found] = length[at], value[at], extra[at]
            where[found] = locate(keys, count, (np.int64(length[at]) << SHIFT) | at)
            found += 1
        at += 1
    pair = np.zeros(2, np.int64)
    best = LIMIT
    chosen[:] = 0
    for one in range(found):
        for two in range(max(one, 1) if one <= strategy.pairs else 1):
            taken = size[one] + size[two]
            if taken > room:
                continue
            score, good = best_pair(
                keys, count, samples, room - taken, worth - gain[one] - gain[two],
                goal - taken * UNIT - cost[one] - cost[two], (where[one], where[two]), best, accept, strategy, pair,
            )  # fmt: skip
            if score < best:
                best = score
                chosen[0], chosen[1], chosen[2], chosen[3] = max(where[one], 0), max(where[two], 0), pair[0], pair[1]
                if good:
                    return best
    return best


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def best_pair(
    keys: Ints,
    count: Int,
    samples: Samples,
    room: Int,
    worth: Int,
    goal: Int,
    taken: tuple[Int, Int],
    best: Int,
    accept: Int,
    strategy: Strategy,
    pair: Ints,
) -> tuple[Int, bool]:
    """Find the pair within `room` with the lowest score and write it to `pair` if below `best`. Index 0 is no sample.

    Returns the lowest score and whether it is good enough to end the search: at most `accept`, with almost no lost
    tokens.

    score = weight * (worth - values) + room left / 4 + (cost - goal)**2 / scale. The scale is smaller above the goal,
    because the other ranks wait for the most expensive pack of a micro-step. Values never decrease with length, so for
    each first sample only the longest second ones that fit are tried.
    """
    extra, value = samples.extra, samples.value
    low, high = 0, count - 1
    while low <= high:
        if (keys[low] >> SHIFT) + (keys[high] >> SHIFT) > room:
            high -= 1
            continue
        if low != taken[0] and low != taken[1]:
            first_extra, first_value = np.int64(0), np.int64(0)
            if low > 0:
                first_extra, first_value = extra[keys[low] & MASK], np.int64(value[keys[low] & MASK])
            for other in range(high, max(low - 1, high - 4), -1):
                if other == taken[0] or other == taken[1] or (other == low and low > 0):
                    continue
                sum_extra, score = first_extra, worth - first_value
                if other > 0:
                    sum_extra += extra[keys[other] & MASK]
                    score -= value[keys[other] & MASK]
                score *= strategy.weight
                if score >= best:
                    break
                tight = score <= 2 * strategy.accept
                size = (keys[low] >> SHIFT) + (keys[other] >> SHIFT)
                miss = (size * UNIT + sum_extra - goal) // UNIT
                score += ((room - size) >> 2) + min(
                    miss * miss // (strategy.over if miss > 0 else strategy.under), strategy.most
                )
                if score < best:
                    best = score
                    pair[0], pair[1] = low, other
                    if tight and score <= accept:
                        return best, True
        low += 1
    return best, False


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def place(state: Ints, keys: Ints, at: Int, samples: Samples) -> Int:
    """Move a sample from the buffer to the pack. Returns its position in the shuffled order."""
    choice = keys[at] & MASK
    for index in range(at, state[COUNT] - 1):
        keys[index] = keys[index + 1]
    samples.used[choice] = 1
    state[COUNT] -= 1
    state[DONE] += 1
    state[PLACED] += samples.length[choice]
    state[PLACED_EXTRA] += samples.extra[choice]
    return choice


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def locate(keys: Ints, count: Int, key: Int) -> Int:
    """Return the first index of the sorted keys, `count` of them, whose key is not smaller."""
    low, high = 0, count
    while low < high:
        middle = (low + high) >> 1
        if keys[middle] < key:
            low = middle + 1
        else:
            high = middle
    return low
