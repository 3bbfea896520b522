"""Compiled kernels that reorder packs and exchange samples, so that the packs of a step cost about the same.

Ranks run packs at the same time and wait for the most expensive one. Three passes, in this order:

1. `spread` distributes packs of every kind evenly over neighbouring steps, so steps stay as similar as in random order.
2. `gather_expensive` moves the most expensive packs of a few neighbouring steps into one of them, where they run at the
   same time, unless that step would become untypical.
3. `even_out` exchanges samples between the packs of each step.

All work in place on a plan: pack p holds the samples `rows[starts[p]:starts[p + 1]]` and costs `costs[p]`, in 1/1024
token. `tokens` and `tiles` are per sample, `per_step` is the number of packs of a step.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from anyres_vlm.data.packing.fill import UNIT, Int, Ints, Rows

# spread
SPREAD_STEPS = 4  # largest number of steps in a block
MOST_VARIANCE = 1.2  # accepted variance of the means of steps, relative to random order
BITS = 21  # of a sort key, for a number of samples or a cost in tokens

# gather_expensive
GATHER_STEPS = 8  # steps in a block
MOST_DEVIATION = 4.0  # largest deviation of the step that receives the packs, in variances of a random order
GAIN = 300  # gather only if it saves at least 1/300 of the cost

# even_out
PARTNERS = 12  # number of cheapest packs to try an exchange with
MEMBERS = 12  # number of samples of a pack that may be exchanged
SUBSETS = 1 + MEMBERS * (MEMBERS + 1) // 2
TOLERANCE = 250  # a step is balanced if its highest cost is within 1/250 of the mean


class Moments(NamedTuple):
    """Mean and variance of the lengths of all samples, and the share of text-only samples."""

    length: float
    variance: float
    text: float


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def measure_moments(tokens: Ints, tiles: Ints) -> Moments:
    """Return the moments of all samples. `tokens` (N,), `tiles` (N,)."""
    total, squares, texts = 0.0, 0.0, 0
    for sample in range(len(tokens)):
        length = float(tokens[sample])
        total += length
        squares += length * length
        texts += tiles[sample] == 0
    mean = total / len(tokens)
    return Moments(mean, squares / len(tokens) - mean * mean, texts / len(tokens))


def spread(rows: Rows, starts: Ints, costs: Ints, tokens: Ints, tiles: Ints, per_step: int, moments: Moments) -> None:
    """Reorder packs in place until mean length and share of text vary over steps about as in random order."""
    for steps in range(2, SPREAD_STEPS + 1):
        if max(vary(rows, starts, tokens, tiles, per_step, moments)) <= MOST_VARIANCE:
            return
        spread_blocks(rows, starts, costs, tokens, tiles, per_step, steps)


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def vary(rows: Rows, starts: Ints, tokens: Ints, tiles: Ints, per_step: Int, moments: Moments) -> tuple[float, float]:
    """Return the variances of mean length and share of text over full steps, relative to random order."""
    full = (len(starts) - 1) // per_step
    total = np.zeros(2)
    for step in range(full):
        counts = count(rows, starts, tokens, tiles, step * per_step, (step + 1) * per_step)
        length, texts, samples = counts[:, 0].sum(), counts[:, 1].sum(), counts[:, 2].sum()
        total[0] += deviation(length, moments.text * samples, samples, moments)
        total[1] += deviation(moments.length * samples, texts, samples, moments)
    return total[0] / max(full, 1), total[1] / max(full, 1)


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def spread_blocks(
    rows: Rows, starts: Ints, costs: Ints, tokens: Ints, tiles: Ints, per_step: Int, most_steps: Int
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


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def gather_expensive(
    rows: Rows, starts: Ints, costs: Ints, tokens: Ints, tiles: Ints, per_step: Int, moments: Moments
) -> None:
    """Gather expensive packs within each block of full steps, in place."""
    full = len(costs) // per_step
    for step in range(0, full, GATHER_STEPS):
        first, last = step * per_step, min(step + GATHER_STEPS, full) * per_step
        counts = count(rows, starts, tokens, tiles, first, last)
        expensive, home = choose_expensive(counts, costs[first:last], per_step, moments)
        if len(expensive):
            reorder(rows, starts, costs, first, exchange(expensive, home, per_step, last - first))


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def choose_expensive(counts: Ints, costs: Ints, per_step: Int, moments: Moments) -> tuple[Ints, Int]:
    """Return the packs of a block that one step should hold, none if nothing is gained, and that step."""
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
        least = MOST_DEVIATION
        for step in range(steps):
            kept = (per_step - many) / max(per_step - number[step], 1)
            held = inside.sum(axis=0) + (whole[step] - inside[step]) * kept
            off = deviation(held[0], held[1], held[2], moments)
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
def exchange(expensive: Ints, home: Int, per_step: Int, packs: Int) -> Ints:
    """Return the new order of a block: expensive packs elsewhere swap places with other packs of the home step."""
    source, is_expensive = np.arange(packs), np.zeros(packs, np.bool_)
    is_expensive[expensive] = True
    first = home * per_step
    others = first + np.flatnonzero(~is_expensive[first : first + per_step])
    away = np.sort(expensive[expensive // per_step != home])
    for index in range(len(away)):
        other = others[index * len(others) // len(away)]
        source[away[index]], source[other] = other, away[index]
    return source


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def deviation(length: Int, texts: Int, samples: Int, moments: Moments) -> float:
    """Return how untypical a step is: the squared deviation of its mean length, or of its share of text if larger.

    It is relative to the variance in random order. The step has `samples` samples of `length` tokens in total, `texts`
    of them text-only.
    """
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
def count(rows: Rows, starts: Ints, tokens: Ints, tiles: Ints, first: Int, last: Int) -> Ints:
    """Count tokens, text-only samples and samples of packs `first` to `last` - 1. Returns (packs, 3)."""
    counts = np.zeros((last - first, 3), np.int64)
    for pack in range(first, last):
        for place in range(starts[pack], starts[pack + 1]):
            counts[pack - first, 0] += tokens[rows[place]]
            counts[pack - first, 1] += tiles[rows[place]] == 0
        counts[pack - first, 2] = starts[pack + 1] - starts[pack]
    return counts


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def reorder(rows: Rows, starts: Ints, costs: Ints, first: Int, source: Ints) -> None:
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
def even_out(
    rows: Rows,
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


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def improve(size: Ints, price: Ints, pack: Ints, load: Ints, cost: Ints, capacity: Int) -> bool:
    """Make the best exchange for the most expensive pack of a step. Return False if none lowers its cost.

    `size` (tokens), `price` (cost) and `pack` (number of its pack) are per sample, `load` (tokens) and `cost` per pack.
    """
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
def list_subsets(members: Ints, size: Ints, price: Ints, subsets: Ints) -> Int:
    """Write all subsets of up to two members to `subsets`, the empty one first, and return their number.

    A row is (tokens, cost, first member, second member), with -1 for no member.
    """
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
