"""Compiled kernels of the planner: shuffle the samples, then fill pack after pack from a small buffer.

The buffer holds the next samples of the shuffled order, sorted by length. Each pack takes the oldest sample of
the buffer first, so that none waits for more packs than the buffer has samples, then more of the oldest ones, chosen among a few for
their cost, and at the end the best combination of up to four that the buffer offers: one or two of the oldest and the
best pair for what is left, found by two pointers. Nothing is reordered beyond the buffer, so lengths stay as random as
the shuffle made them.

All arithmetic is on integers. Lengths and prices are in tokens; costs are in 1/1024 token (`UNIT`).
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

Int = Any  # Python's or numpy's: compiled, there is no difference
Ints = NDArray[np.int64]

UNIT = 1024  # cost units a token
AGES = 8  # oldest samples among which the cost decides while a pack is far from full
CANDIDATES = 12  # oldest samples that the search for the last ones tries
LIMIT = np.int64(1) << 60
SHIFT = 32  # a key of the buffer is length << 32 | position in the shuffled order
MASK = (1 << SHIFT) - 1


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def shuffle(count: Int, seed: np.uint64) -> NDArray[np.int32]:
    """Fisher-Yates by splitmix64: the same order on every machine and with every version of numpy."""
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
    """Lengths, and costs beyond the length in 1/1024 token, in the shuffled order.

    `square` is the cost of a squared token in 2**-30 tokens, `tile` that of a tile in 1/1024 token.
    """
    length = np.empty(len(order), np.int32)
    extra = np.empty(len(order), np.int64)
    for place in range(len(order)):
        size = tokens[order[place]]
        length[place] = size
        extra[place] = (size * size * square >> 20) + tiles[order[place]] * tile
    return length, extra


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def locate(keys: Ints, count: Int, key: Int) -> Int:
    """The first index whose key is not smaller."""
    low, high = 0, count
    while low < high:
        middle = (low + high) >> 1
        if keys[middle] < key:
            low = middle + 1
        else:
            high = middle
    return low


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def insert(keys: Ints, count: Int, key: Int) -> None:
    """Insert into the first `count` sorted keys."""
    at = locate(keys, count, key)
    for index in range(count, at, -1):
        keys[index] = keys[index - 1]
    keys[at] = key


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def remove(keys: Ints, count: Int, at: Int) -> None:
    """Remove one of the first `count` keys."""
    for index in range(at, count - 1):
        keys[index] = keys[index + 1]


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def best_pair(
    keys: Ints,
    count: Int,
    extra: Ints,
    value: NDArray[np.int32],
    room: Int,
    worth: Int,
    goal: Int,
    taken: tuple[Int, Int],
    best: Int,
    accept: Int,
    settings: Ints,
    pair: Ints,
) -> tuple[Int, bool]:
    """The pair within `room` of the lowest score, written to `pair` if below `best`. Index 0 stands for no sample.

    Returns the lowest score and whether it is good enough to end the search: at most `accept`, with next to no lost
    tokens.

    score = weight * (worth - values) + room left / 4 + (cost - goal)**2 / scale, with a smaller scale above the goal,
    for the costliest pack of a micro-step is the one that the others wait for. Values do not fall with the length, so
    for each first sample the longest second ones that fit are tried.
    """
    weight, over, under = settings[1], settings[2], settings[3]
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
                score *= weight
                if score >= best:
                    break
                tight = score <= 2 * settings[0]
                size = (keys[low] >> SHIFT) + (keys[other] >> SHIFT)
                miss = (size * UNIT + sum_extra - goal) // UNIT
                score += ((room - size) >> 2) + miss * miss // (over if miss > 0 else under)
                if score < best:
                    best = score
                    pair[0], pair[1] = low, other
                    if tight and score <= accept:
                        return best, True
        low += 1
    return best, False


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def best_end(
    keys: Ints,
    count: Int,
    oldest: Int,
    head: Int,
    used: NDArray[np.uint8],
    length: NDArray[np.int32],
    extra: Ints,
    value: NDArray[np.int32],
    room: Int,
    worth: Int,
    goal: Int,
    accept: Int,
    settings: Ints,
    chosen: Ints,
) -> Int:
    """Choose up to four samples that end a pack; their indices in the buffer, 0 for none, go to `chosen`."""
    place, where = np.empty(CANDIDATES, np.int64), np.empty(CANDIDATES, np.int64)
    found, at = 0, oldest
    while at < head and found < CANDIDATES:
        if not used[at]:
            place[found], where[found] = at, locate(keys, count, (np.int64(length[at]) << SHIFT) | at)
            found += 1
        at += 1
    pair = np.zeros(2, np.int64)
    best = LIMIT
    chosen[:] = 0
    for one in range(-1, found):
        for two in range(-1, max(one, 0) if one < settings[5] else 0):
            size: Int = np.int64(0)
            gain: Int = np.int64(0)
            cost: Int = np.int64(0)
            first: Int = -1
            second: Int = -1
            if one >= 0:
                at, first = place[one], where[one]
                size += length[at]
                gain += value[at]
                cost += extra[at]
            if two >= 0:
                at, second = place[two], where[two]
                size += length[at]
                gain += value[at]
                cost += extra[at]
            if size > room:
                continue
            score, good = best_pair(
                keys, count, extra, value, room - size, worth - gain, goal - size * UNIT - cost,
                (first, second), best, accept, settings, pair,
            )  # fmt: skip
            if score < best:
                best = score
                chosen[0], chosen[1], chosen[2], chosen[3] = max(first, 0), max(second, 0), pair[0], pair[1]
                if good:
                    return best
    return best


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def best_next(
    oldest: Int,
    head: Int,
    used: NDArray[np.uint8],
    length: NDArray[np.int32],
    extra: Ints,
    room: Int,
    goal: Int,
    full: Int,
    capacity: Int,
) -> Int:
    """The one of the oldest samples that brings the pack's cost nearest to its due for its length; -1 if none fits."""
    due = goal - room * full // capacity
    best, choice, seen, at = LIMIT, -1, 0, oldest
    while seen < AGES and at < head:
        if not used[at]:
            seen += 1
            size = np.int64(length[at])
            if size <= room:
                miss = abs(due - (extra[at] + size * UNIT - size * full // capacity))
                if miss < best:
                    best, choice = miss, at
        at += 1
    return choice


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def fill(
    order: NDArray[np.int32],
    length: NDArray[np.int32],
    extra: Ints,
    value: NDArray[np.int32],
    capacity: Int,
    per_step: Int,
    settings: Ints,
) -> tuple[NDArray[np.int32], Ints, Ints, Int, Int]:
    """Fill packs until no sample is left.

    Returns the samples in the order of their packs, each pack's first index in it (packs + 1), each pack's cost in
    1/1024 token, and how many packs, with how many tokens, there were when the last sample came into the buffer.

    settings: score that ends a search, weight of a lost token, scales of a cost over and under the goal, tenths of a
    mean length at which the last samples are searched, candidates that are also tried in twos, expected efficiency
    in 1/1024, sixteenths of the running mean score that also end a search, samples in the buffer.
    """
    total = len(length)
    rows, starts, costs = np.empty(total, np.int32), np.zeros(total + 1, np.int64), np.empty(total, np.int64)
    used = np.zeros(total, np.uint8)
    keys, chosen = np.zeros(settings[8] + 2, np.int64), np.zeros(4, np.int64)
    count, head, oldest, ahead = 1, 0, 0, 0  # keys[0] is no sample
    held_tokens, held_extra, ahead_tokens, ahead_extra = np.int64(0), np.int64(0), np.int64(0), np.int64(0)
    pack, done, full, mean_score = 0, 0, np.int64(0), np.int64(0)
    fed_tokens, dry_packs, dry_tokens = np.int64(0), 0, np.int64(0)
    while True:
        if head < total:
            dry_packs, dry_tokens = pack, fed_tokens - held_tokens
        while count <= settings[8] and head < total:
            insert(keys, count, (np.int64(length[head]) << SHIFT) | head)
            count += 1
            held_tokens += length[head]
            fed_tokens += length[head]
            held_extra += extra[head]
            if ahead > head:
                ahead_tokens -= length[head]
                ahead_extra -= extra[head]
            head += 1
        if ahead < head:
            ahead, ahead_tokens, ahead_extra = head, np.int64(0), np.int64(0)
        if count == 1:
            if dry_packs == 0:  # too few samples to tell the end apart
                dry_packs, dry_tokens = pack, fed_tokens
            return rows, starts[: pack + 1].copy(), costs[:pack].copy(), dry_packs, dry_tokens
        if pack % per_step == 0:  # the goal of a step's packs is the cost a token of the samples that it will hold
            while ahead < total and held_tokens + ahead_tokens < per_step * capacity:
                ahead_tokens += length[ahead]
                ahead_extra += extra[ahead]
                ahead += 1
            expected = capacity * settings[6] // 1024
            full = expected * UNIT + (held_extra + ahead_extra) * expected // (held_tokens + ahead_tokens)
        room, worth, goal, first = np.int64(capacity), np.int64(capacity), full, True
        cost = np.int64(0)
        while count > 1:
            while used[oldest]:
                oldest += 1
            choice = oldest
            if not first:
                if 10 * room * (count - 1) < settings[4] * held_tokens:
                    break
                choice = best_next(oldest, head, used, length, extra, room, goal, full, capacity)
                if choice < 0:
                    break
            first = False
            remove(keys, count, locate(keys, count, (np.int64(length[choice]) << SHIFT) | choice))
            count -= 1
            used[choice] = 1
            rows[done] = order[choice]
            done += 1
            price = length[choice] * UNIT + extra[choice]
            room, worth, goal, cost = room - length[choice], worth - value[choice], goal - price, cost + price
            held_tokens, held_extra = held_tokens - length[choice], held_extra - extra[choice]
        accept = max(settings[0], (mean_score >> 10) * settings[7] >> 4)
        score = best_end(
            keys, count, oldest, head, used, length, extra, value, room, worth, goal, accept, settings, chosen
        )
        mean_score += (min(score, 100_000) * 1024 - mean_score) >> 6
        chosen.sort()
        for index in range(3, -1, -1):
            if chosen[index] > 0:
                choice = keys[chosen[index]] & MASK
                remove(keys, count, chosen[index])
                count -= 1
                used[choice] = 1
                rows[done] = order[choice]
                done += 1
                cost += length[choice] * UNIT + extra[choice]
                held_tokens, held_extra = held_tokens - length[choice], held_extra - extra[choice]
        costs[pack] = cost
        pack += 1
        starts[pack] = done
