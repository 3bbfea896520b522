"""Benchmark of the packing planner: next fit, first fit in windows and `plan_epoch` on the same lengths.

"next fit" is a plain Python loop over lists that returns lists of packs, as data loaders have it. "compiled nf" is the
same loop over arrays, compiled by numba; no method that searches can be as fast. The planner's ratios to both are
printed. "first fit" searches the last 200 packs and is compiled, too. Each method shuffles, packs and adds up the costs
of its packs, and is timed after a first run that compiles.

The mix of stage 2 is drawn from a seed. Image tokens come from the project's geometry (2x2 grid, `spatial_unpad`), so
common lengths are as common as in real data (2,340 for 640x480, 2,928 for a square):

    share  kind             images                                                  text tokens, log-normal median
    8%     text only        none                                                    400
    36%    natural images   80% of COCO's common sizes, 20% of 200-1,100 px a side  110
    24%    documents        pages of 900-1,700 x 1,100-2,200 px                     200
    11%    charts           330-1,200 x 250-900 px                                  100
    21%    multi-turn       as natural images                                       540

Samples are cut at 4,096 tokens. Captions, as in stage 1: images of 200-1,100 px a side and 8-200 tokens of text.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import of_peer
from numpy.typing import NDArray

from anyres_vlm.cli.plan import write_plan
from anyres_vlm.data.packing.bound import bound_efficiency
from anyres_vlm.data.packing.cost import CostModel
from anyres_vlm.data.packing.fill import UNIT
from anyres_vlm.data.packing.plan import Plan, gather, plan_epoch, shuffle
from anyres_vlm.geometry import Size, Tiling, plan_tiles

Ints = NDArray[np.int64]
Mix = tuple[Ints, Ints]  # tokens and tiles, (N,) each

COSTS = {"7B": CostModel(), "0.5B": CostModel(4.4e-5, 385.0)}
PACKS = 64  # per optimizer step
QUICK = {"samples": 200_000, "repeats": 3}
COMMON = ((480, 640),) * 40 + ((640, 480),) * 15 + ((427, 640),) * 12 + ((375, 500),) * 10 + ((640, 427),) * 6
COMMON += ((500, 375),) * 5 + ((612, 612),) * 2 + ((360, 640),) * 3  # (height, width)
POOL = 2000  # distinct random sizes of each kind


def images(rng: np.random.Generator, count: int, heights: tuple[int, int], widths: tuple[int, int]) -> Mix:
    """Draw visual tokens and tiles of images from a pool of sizes whose sides are uniform."""
    return _draw(rng, count, [_size(rng, heights, widths) for _ in range(POOL)])


def photographs(rng: np.random.Generator, count: int) -> Mix:
    """Draw visual tokens and tiles of natural images, four fifths of them of common sizes."""
    common = [Size(height=height, width=width) for height, width in COMMON]
    return _draw(rng, count, common * 4 + [_size(rng, (200, 1100), (200, 1100)) for _ in common])


def stage2_mix(samples: int, seed: int = 0) -> Mix:
    """Draw the mix of the table above."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(5, samples, p=(0.08, 0.36, 0.24, 0.11, 0.21))
    text = rng.lognormal(
        np.array([6.0, 4.7, 5.3, 4.6, 6.3])[kind], np.array([0.9, 0.7, 0.8, 0.6, 0.7])[kind]
    )  # fmt: skip
    tokens, tiles = np.maximum(np.rint(text), 8).astype(np.int64), np.zeros(samples, np.int64)
    drawn: dict[int, Callable[[int], Mix]] = {
        1: lambda count: photographs(rng, count),
        2: lambda count: images(rng, count, (1100, 2200), (900, 1700)),
        3: lambda count: images(rng, count, (250, 900), (330, 1200)),
        4: lambda count: photographs(rng, count),
    }
    for number, draw in drawn.items():
        where = np.flatnonzero(kind == number)
        visual, tiles[where] = draw(len(where))
        tokens[where] += visual
    return np.minimum(tokens, 4096), tiles


def captions_mix(samples: int, seed: int = 0) -> Mix:
    """Draw samples of 976 to 2,928 image tokens and a short caption; none is short."""
    rng = np.random.default_rng(seed)
    visual, tiles = images(rng, samples, (200, 1100), (200, 1100))
    return visual + np.clip(np.rint(rng.lognormal(3.4, 0.4, samples)), 8, 200).astype(np.int64), tiles


def _size(rng: np.random.Generator, heights: tuple[int, int], widths: tuple[int, int]) -> Size:
    return Size(height=int(rng.integers(*heights)), width=int(rng.integers(*widths)))


def _draw(rng: np.random.Generator, count: int, sizes: list[Size]) -> Mix:
    tiling = Tiling()
    plans = [plan_tiles(size, tiling) for size in sizes]
    pick = rng.integers(0, len(plans), count)
    tokens, tiles = (
        np.array(column) for column in zip(*[(p.total_tokens, p.num_tiles) for p in plans], strict=True)
    )  # fmt: skip
    return tokens[pick], tiles[pick]


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _fit(tokens: Ints, order: NDArray[np.int32], capacity: int, window: int) -> Ints:
    """Return the pack of each sample: the first of the last `window` packs that has room. `window` 1 is next fit."""
    packs, room, count = np.empty(len(order), np.int64), np.full(len(order) + 1, capacity), 1
    first = 0
    for place in range(len(order)):
        size = tokens[order[place]]
        first = max(first, count - window)
        while first < count and room[first] == 0:
            first += 1
        target = first
        while target < count and room[target] < size:
            target += 1
        if target == count:
            count += 1
        room[target] -= size
        packs[place] = target
    return packs


def fit_plan(mix: Mix, capacity: int, cost: CostModel, window: int) -> Plan:
    """Return a plan, shuffled and with costs like ours, whose packs are filled by next fit or first fit."""
    tokens, tiles = mix
    order = shuffle(len(tokens), np.uint64(1))
    length, extra = gather(order, tokens, tiles, cost.fixed_square, cost.fixed_tile)
    packs = _fit(tokens, order, capacity, window)
    rows = order if window == 1 else order[np.argsort(packs, kind="stable")]
    starts = np.concatenate([[0], np.cumsum(np.bincount(packs))])
    costs = np.bincount(packs, length.astype(np.int64) * UNIT + extra).astype(np.int64)
    return Plan(tokens, tiles, capacity, 0, 0, 0, cost, PACKS, rows, starts, costs)


def plain_plan(mix: Mix, capacity: int, cost: CostModel) -> Plan:
    """Return a plan by next fit in plain Python over lists."""
    tokens, tiles = mix
    lengths, packs, room = tokens.tolist(), [], 0
    for sample in np.random.default_rng(1).permutation(len(tokens)).tolist():
        length = lengths[sample]
        if length > room:
            pack: list[int] = []
            packs.append(pack)
            room = capacity
        pack.append(sample)
        room -= length
    rows = np.fromiter(chain.from_iterable(packs), np.int32, len(tokens))
    starts = np.concatenate([[0], np.cumsum([len(pack) for pack in packs])])
    length, extra = gather(rows, tokens, tiles, cost.fixed_square, cost.fixed_tile)
    costs = np.add.reduceat(length * np.int64(UNIT) + extra, starts[:-1])
    return Plan(tokens, tiles, capacity, 0, 0, 0, cost, PACKS, rows, starts, costs)


def our_plan(mix: Mix, capacity: int, cost: CostModel) -> Plan:
    """Return the plan of `plan_epoch`."""
    settings: dict[str, Any] = {"capacity": capacity, "batch_size": 430, "seed": 1, "epoch": 0, "cost": cost}
    return plan_epoch(*mix, **settings, packs_per_step=PACKS)


def file_to_file(mix: Mix, make: Callable[[], Plan]) -> None:
    """Do what `anyres plan --out` does: read an index, plan, distribute to 8 ranks, write one row per sample."""
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder) / "index.parquet"
        pq.write_table(pa.table({"tokens": mix[0], "tiles": mix[1]}), index)
        table = pq.read_table(index)
        write_plan(make(), np.arange(table.num_rows), 8, Path(folder) / "plan.parquet")


def figures(plan: Plan) -> dict[str, float]:
    """Return efficiency, straggler factors and randomness over the full steps, computed from the rows of the packs."""
    tokens, tiles, steps = plan.tokens, plan.tiles, plan.num_packs // PACKS
    pack = np.repeat(np.arange(plan.num_packs), np.diff(plan.starts))
    lengths = tokens[plan.rows].astype(np.float64)
    load = np.bincount(pack, lengths)
    assert load.max() <= plan.capacity, "a pack is over the capacity"
    cost = load + np.bincount(pack, plan.cost.square * lengths**2 + plan.cost.tile * tiles[plan.rows])
    found = {"efficiency": float(tokens.sum() / (plan.num_packs * plan.capacity))}
    for ranks in (8, 64):
        groups = np.sort(cost[: steps * PACKS].reshape(steps, PACKS), axis=1).reshape(-1, ranks)
        found[f"straggler_{ranks}"] = float(groups.max(1).sum() / groups.mean(1).sum())
    step = pack // PACKS
    inside = step < steps
    count = np.bincount(step[inside])
    mean = np.bincount(step[inside], lengths[inside]) / count
    found["length_variance"] = float(mean.var() * count.mean() / tokens.var())
    text = tiles == 0
    if text.any():
        share = np.bincount(step[inside], text[plan.rows][inside]) / count
        found["text_variance"] = float(share.var() * count.mean() / text.var())
    rank = np.argsort(np.argsort(mean))
    found["spearman"] = float(np.corrcoef(rank, np.arange(steps))[0, 1])
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--samples", type=int, default=1_000_000, help="samples of each mix")
    parser.add_argument("--repeats", type=int, default=5, help="alternating timed runs; medians are shown")
    parser.add_argument("--whole", action="store_true", help="time index file to plan file, not planning only")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Plan every case with every method. Times are medians of alternating runs."""
    stage2, captions = stage2_mix(arguments.samples), captions_mix(arguments.samples)
    cases = [("stage 2", stage2, 16_384, name) for name in COSTS]
    cases += [("stage 2", stage2, 8192, "7B"), ("captions", captions, 16_384, "7B")]
    rows, ratios = [], {}
    for name, mix, capacity, model in cases:
        methods = make_methods(mix, capacity, COSTS[model])
        plans = {method: make() for method, make in methods.items()}  # compiles too
        seconds: dict[str, list[float]] = {method: [] for method in methods}
        for _ in range(arguments.repeats):
            for method, make in methods.items():
                start = time.process_time()
                if arguments.whole:
                    file_to_file(mix, make)
                else:
                    make()
                seconds[method].append(time.process_time() - start)
        median = {method: float(np.median(times)) for method, times in seconds.items()}
        bound = bound_efficiency(mix[0], capacity).efficiency
        for method, plan in plans.items():
            row = {"mix": name, "capacity": capacity, "cost": model, "method": method, "bound": bound, **figures(plan)}
            row |= {"seconds": median[method], "of_next_fit": median[method] / median["next fit"]}
            rows.append({**row, "of_compiled_next_fit": median[method] / median["compiled nf"]})
        case = f"{name} {capacity} {model}"
        ratios[f"{case}, speed"] = of_peer(seconds["next fit"], seconds["anyres"])
        ratios[f"{case}, packs"] = [plans["next fit"].num_packs / plans["anyres"].num_packs]
    tokens, tiles = stage2
    mean = {"mean_tokens": float(tokens.mean()), "mean_tiles": float(tiles.mean())}
    timed = "index file to plan file" if arguments.whole else "planning"
    return {"samples": arguments.samples, "timed": timed, **mean, "rows": rows, "ratios": ratios}


def make_methods(mix: Mix, capacity: int, cost: CostModel) -> dict[str, Callable[[], Plan]]:
    """Return the methods that are compared, by name."""
    return {
        "next fit": lambda: plain_plan(mix, capacity, cost),
        "compiled nf": lambda: fit_plan(mix, capacity, cost, 1),
        "first fit": lambda: fit_plan(mix, capacity, cost, 200),
        "anyres": lambda: our_plan(mix, capacity, cost),
    }


def show(result: dict[str, Any]) -> None:
    """Print the rows as a table."""
    print(
        f"{result['samples']:,} samples; stage 2: mean {result['mean_tokens']:,.0f} tokens, "
        f"{result['mean_tiles']:.2f} tiles; steps of {PACKS} packs; CPU seconds of {result['timed']}"
    )
    print(
        "mix       budget cost  method       effic.  bound   S 8     S 64    len.var text.var  rho     s      "
        "x next fit  x compiled"
    )
    for row in result["rows"]:
        print(
            f"{row['mix']:9} {row['capacity']:6} {row['cost']:5} {row['method']:12} {row['efficiency']:.4f}  "
            f"{row['bound']:.4f}  {row['straggler_8']:.4f}  {row['straggler_64']:.4f}  {row['length_variance']:7.2f} "
            f"{row.get('text_variance', float('nan')):7.2f}  {row['spearman']:+.3f}  {row['seconds']:5.2f}  "
            f"{row['of_next_fit']:10.2f} {row['of_compiled_next_fit']:11.1f}"
        )
