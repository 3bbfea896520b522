"""Plan an epoch: which samples share a pack, which packs an optimizer step has, and which rank runs them.

`plan_epoch` shuffles the samples, fills packs in about that order (`fill`), then reorders packs and exchanges samples
so that concurrent packs cost about the same (`balance`). A plan depends on lengths, settings, seed and epoch only, not
on the number of ranks; `Plan.shares` deals the packs of a step to any number of them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numba
import numpy as np

from anyres_vlm.data.packing import fill
from anyres_vlm.data.packing.balance import even_out, gather_expensive, measure_moments, spread
from anyres_vlm.data.packing.bound import bound_efficiency
from anyres_vlm.data.packing.cost import CostModel
from anyres_vlm.data.packing.fill import Int, Ints, Rows
from anyres_vlm.errors import UsageError

VERSION = 2  # of the algorithm; part of the key of a plan
LONGEST = 2**20  # tokens; keeps the fixed-point costs within 64 bits
PILOT = 16_384  # samples on which strategies are tried
PRICE_CLASSES = 128  # classes of lengths in the bound that prices them: takes 0.1 to 0.2 s
GOOD = 0.9975  # efficiency at which the first strategy is used without computing the bound
CAP = 32  # a missed cost goal scores at most like losing 1/32 of the capacity, so tiles do not cause large gaps
WEIGHT = 8  # score of a lost token
NEAR = 0.992  # fraction of the bound at which no other strategy is tried
WIDE = 300  # if a buffer of this width does not help, wider ones are not tried
# Strategies to try if packs are not full: whether to use prices, then near, pairs, over, relax and width of
# `fill.Strategy`. Each is the best for some data; a wide buffer helps if few samples fit a pack.
STRATEGIES = (
    (True, 40, 0, 30, 0, 96),
    (True, 40, 8, 30, 0, 96),
    (False, 35, 8, 30, 0, 160),
    (True, 35, 8, 5, 8, 300),
    (True, 35, 8, 5, 8, 600),
    (True, 35, 8, 5, 8, 1200),
)


@dataclass(frozen=True)
class Plan:
    """The packs of an epoch: pack p holds the samples `rows[starts[p]:starts[p + 1]]`.

    `rows` are positions in `tokens` and `tiles`, (N,) each. `costs` are per pack, in 1/1024 token. Each step has
    `packs_per_step` consecutive packs, the last one what remains.
    """

    tokens: Ints
    tiles: Ints
    capacity: int
    batch_size: int
    seed: int
    epoch: int
    cost: CostModel
    packs_per_step: int
    rows: Rows
    starts: Ints
    costs: Ints

    @property
    def num_packs(self) -> int:
        """Number of packs."""
        return len(self.costs)

    @property
    def num_steps(self) -> int:
        """Number of optimizer steps."""
        return -(-self.num_packs // self.packs_per_step)

    @cached_property
    def key(self) -> str:
        """Hash of everything the plan depends on; together with a step number it is the state to resume from."""
        digest = hashlib.blake2b(self.tokens.tobytes(), digest_size=16)
        digest.update(self.tiles.tobytes())
        settings = (self.capacity, self.batch_size, self.packs_per_step, self.seed, self.epoch)
        digest.update(repr((VERSION, *settings, self.cost.fixed_square, self.cost.fixed_tile)).encode())
        return digest.hexdigest()

    def packs(self, step: int) -> list[Rows]:
        """Return the packs of a step as sample rows."""
        first, last = self._range(step)
        return [self.rows[self.starts[pack] : self.starts[pack + 1]] for pack in range(first, last)]

    def shares(self, step: int, world_size: int) -> list[list[Rows]]:
        """Return the packs of a step for each rank, one per micro-step, empty where they do not divide evenly.

        Packs are sorted by cost and dealt to the ranks in turn, so those of one micro-step cost about the same.
        """
        packs = self.packs(step)
        micro_steps, ranks = _deal(self.costs[slice(*self._range(step))], np.zeros(len(packs), np.int64), world_size)
        shares = [[self.rows[:0]] * -(-len(packs) // world_size) for _ in range(world_size)]
        for pack, micro_step, rank in zip(packs, micro_steps, ranks, strict=True):
            shares[rank][micro_step] = pack
        return shares

    def assign(self, world_size: int) -> tuple[Ints, Ints]:
        """Return micro-step (within the step) and rank of each pack, as dealt by `shares`. (packs,), (packs,)."""
        return _deal(self.costs, np.arange(self.num_packs) // self.packs_per_step, world_size)

    def _range(self, step: int) -> tuple[int, int]:
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of a plan of {self.num_steps}")
        first = step * self.packs_per_step
        return first, min(first + self.packs_per_step, self.num_packs)


def _deal(costs: Ints, steps: Ints, world_size: int) -> tuple[Ints, Ints]:
    """Return micro-step and rank of each pack, (packs,) each.

    The most expensive packs of a step come first, so an incomplete micro-step is the cheapest one.
    """
    if world_size < 1:
        raise UsageError(f"{world_size} ranks: expected at least 1")
    order = np.lexsort((-costs, steps))  # stable; steps are sorted already and keep their order
    place = np.empty(len(costs), np.int64)
    place[order] = np.arange(len(costs)) - np.searchsorted(steps, steps)
    return place // world_size, place % world_size


def plan_epoch(
    tokens: Ints,
    tiles: Ints,
    *,
    capacity: int,
    batch_size: int,
    seed: int,
    epoch: int,
    cost: CostModel,
    packs_per_step: int | None = None,
) -> Plan:
    """Pack every sample once. `tokens` and `tiles` (N,) are per sample; `capacity` in tokens, `batch_size` in samples.

    Without `packs_per_step`, a step has as many packs as `batch_size` samples fill, rounded by `round_packs`. The same
    arguments give the same plan on every machine. Raises `UsageError` for invalid settings and lengths.
    """
    _check(tokens, tiles, capacity, batch_size, packs_per_step)
    seed_bytes = hashlib.blake2b(f"packing/{seed}/{epoch}".encode(), digest_size=8).digest()
    key = np.uint64(int.from_bytes(seed_bytes, "little"))
    length, extra = gather(shuffle(len(tokens), key), tokens, tiles, cost.fixed_square, cost.fixed_tile)
    exact = batch_size * int(tokens.sum()) / (len(tokens) * capacity)
    strategy, table, efficiency = _choose(length, extra, capacity, packs_per_step or max(1, round(exact)))
    packs_per_step = packs_per_step or round_packs(exact / efficiency)
    value = length if table is None else table[length]
    positions, starts, costs, _, _ = fill.fill(length, extra, value, capacity, packs_per_step, strategy)
    del length, extra, value
    rows = shuffle(len(tokens), key)[positions]  # shuffled again: fast, and saves keeping the order in memory
    del positions
    moments = measure_moments(tokens, tiles)
    spread(rows, starts, costs, tokens, tiles, packs_per_step, moments)
    gather_expensive(rows, starts, costs, tokens, tiles, packs_per_step, moments)
    even_out(rows, starts, costs, tokens, tiles, cost.fixed_square, cost.fixed_tile, capacity, packs_per_step)
    return Plan(tokens, tiles, capacity, batch_size, seed, epoch, cost, packs_per_step, rows, starts, costs)


def _check(tokens: Ints, tiles: Ints, capacity: int, batch_size: int, packs_per_step: int | None) -> None:
    if len(tokens) == 0 or len(tokens) != len(tiles):
        raise UsageError(
            f"{len(tokens)} lengths and {len(tiles)} numbers of tiles: expected the same number, at least 1"
        )
    if len(tokens) >= 2**31:
        raise UsageError(f"{len(tokens):,} samples: at most {2**31 - 1:,} fit a plan; split the data")
    for name, number in (("batch size", batch_size), ("packs per step", packs_per_step)):
        if number is not None and number < 1:
            raise UsageError(f"{name} {number}: expected at least 1")
    shortest, longest = int(tokens.argmin()), int(tokens.argmax())
    if tokens[shortest] < 1:
        raise UsageError(f"sample {shortest} has {tokens[shortest]} tokens: every sample needs at least 1")
    if tokens[longest] > capacity:
        raise UsageError(
            f"sample {longest} has {tokens[longest]:,} tokens, more than the capacity of {capacity:,}: raise the "
            f"capacity to {tokens[longest]:,} or more, or shorten the sample"
        )
    if capacity > LONGEST:
        raise UsageError(f"capacity {capacity:,}: at most {LONGEST:,} tokens")
    if tiles.min() < 0:
        raise UsageError(f"sample {int(tiles.argmin())} has {tiles.min()} tiles: expected 0 or more")


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def shuffle(count: Int, seed: np.uint64) -> Rows:
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
def gather(order: Rows, tokens: Ints, tiles: Ints, square: Int, tile: Int) -> tuple[Rows, Ints]:
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


def _choose(length: Rows, extra: Ints, capacity: int, per_step: int) -> tuple[fill.Strategy, Rows | None, float]:
    """Return the strategy that wastes least on the first samples, the worth of each length, and the efficiency.

    If packs can be filled completely, each token is worth 1 and the second value is None. If the lengths do not allow
    that, the prices of the bound tell which combinations to prefer, and full packs matter more than equal costs.
    """
    pilot = slice(0, PILOT)

    def try_strategy(strategy: fill.Strategy, value: Rows, prices: Rows) -> tuple[float, float]:
        """Return the efficiency, and its ratio to the bound that the prices give for the same samples."""
        positions, starts, _, packs, filled = fill.fill(
            length[pilot], extra[pilot], value, capacity, per_step, strategy
        )
        if len(length) <= PILOT:  # all samples, so the last packs count, too
            packs, filled = len(starts) - 1, int(length.sum(dtype=np.int64))
        worth = int(prices[positions[: starts[packs]]].sum(dtype=np.int64))
        return filled / (packs * capacity), max(filled, worth) / (packs * capacity)

    strategy = _strategy(capacity, over=90, near=30, pairs=0, expected=0.9995, relax=12, width=96)
    efficiency, _ = try_strategy(strategy, length[pilot], length[pilot])
    best: tuple[fill.Strategy, Rows | None, float] = strategy, None, efficiency
    if efficiency >= GOOD:
        return best
    bound = bound_efficiency(length, capacity, PRICE_CLASSES)
    table = bound.values(capacity)
    prices, expected = table[length[pilot]], min(0.995 * bound.efficiency, 0.9995)
    efficiency, ratio = try_strategy(strategy, length[pilot], prices)
    for by_price, near, pairs, over, relax, width in STRATEGIES:
        if ratio >= NEAR:
            break
        strategy = _strategy(capacity, over=over, near=near, pairs=pairs, expected=expected, relax=relax, width=width)
        efficiency, new_ratio = try_strategy(strategy, prices if by_price else length[pilot], prices)
        if new_ratio > ratio * 1.001:
            best, ratio = (strategy, table if by_price else None, efficiency), new_ratio
        elif width >= WIDE:
            break
    return best


def _strategy(
    capacity: int, *, over: int, near: int, pairs: int, expected: float, relax: int, width: int
) -> fill.Strategy:
    """Return a strategy whose scores and scales grow in proportion to the capacity."""
    scale = max(capacity // over, 1)
    return fill.Strategy(
        width=width,
        near=near,
        pairs=pairs,
        weight=WEIGHT,
        over=scale,
        under=2 * scale,
        most=WEIGHT * capacity // CAP,
        accept=WEIGHT * (15 * capacity // 16_384 + 4),
        relax=relax,
        expected=int(expected * 1024),
    )


def round_packs(exact: float) -> int:
    """Round to the multiple of the highest power of two within a sixth, so that it divides over many rank counts."""
    power = 1 << 30
    while power > 1:
        near = round(exact / power) * power
        if near and abs(near - exact) <= exact / 6:
            return near
        power //= 2
    return max(1, round(exact))
