"""The planner: every sample once, within capacity, balanced costs, random steps, the same plan everywhere."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray

from anyres_vlm.data.packing.bound import bound_efficiency
from anyres_vlm.data.packing.cost import CostModel
from anyres_vlm.data.packing.plan import Plan, plan_epoch, round_packs
from anyres_vlm.data.packing.report import measure
from anyres_vlm.errors import UsageError

SMALL_LLM = CostModel(4.4e-5, 385.0)
Mix = Callable[[int, int], tuple[NDArray[np.int64], NDArray[np.int64]]]


def make(tokens: object, tiles: object = None, **changes: object) -> Plan:
    tokens = np.asarray(tokens, np.int64)
    tiles = np.zeros_like(tokens) if tiles is None else np.asarray(tiles, np.int64)
    settings = {"capacity": 100, "batch_size": 8, "seed": 0, "epoch": 0, "cost": CostModel(), **changes}
    return plan_epoch(tokens, tiles, **settings)  # type: ignore[arg-type]


def mixture(seed: int, samples: int, text: float = 0.1) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A mix unlike the benchmark's: uniform texts and two clusters of image lengths with a tail."""
    rng = np.random.default_rng(seed)
    is_text = rng.random(samples) < text
    image = np.where(rng.random(samples) < 0.5, rng.integers(2300, 2600, samples), rng.integers(1500, 3800, samples))
    return np.where(is_text, rng.integers(20, 1200, samples), image), np.where(is_text, 0, 5)


def step_means(plan: Plan, values: NDArray[np.number]) -> NDArray[np.float64]:
    full = plan.num_packs // plan.packs_per_step
    return np.array([values[np.concatenate(plan.packs(step))].mean() for step in range(full)])


lengths = st.one_of(
    st.lists(st.integers(1, 100), min_size=1, max_size=300),
    st.lists(st.just(100), min_size=1, max_size=40),  # exactly the capacity
    st.lists(st.sampled_from([48, 52, 7]), min_size=1, max_size=300),  # clusters
    st.lists(st.integers(1, 6), min_size=1, max_size=400),  # all short
)


@settings(max_examples=150, deadline=None)
@given(
    tokens=lengths,
    tile_of=st.sampled_from([0, 1, 5]),
    batch_size=st.integers(1, 60),
    seed=st.integers(0, 3),
    ranks=st.integers(1, 9),
    packs=st.none() | st.integers(1, 12),
)
def test_every_sample_once_within_capacity(
    tokens: list[int], tile_of: int, batch_size: int, seed: int, ranks: int, packs: int | None
) -> None:
    tiles = [tile_of * (size % 2) for size in tokens]
    plan = make(tokens, tiles, batch_size=batch_size, seed=seed, packs_per_step=packs)
    steps = [plan.packs(step) for step in range(plan.num_steps)]
    assert sorted(int(row) for step in steps for pack in step for row in pack) == list(range(len(tokens)))
    assert all(1 <= sum(tokens[row] for row in pack) <= 100 for step in steps for pack in step)
    assert all(len(step) == plan.packs_per_step for step in steps[:-1])
    assert 1 <= len(steps[-1]) <= plan.packs_per_step
    assert packs is None or plan.packs_per_step == packs
    for step, whole in enumerate(steps):
        shares = plan.shares(step, ranks)
        assert [len(share) for share in shares] == [-(-len(whole) // ranks)] * ranks
        dealt = sorted(tuple(pack) for share in shares for pack in share if len(pack))
        assert dealt == sorted(tuple(pack) for pack in whole)
    report = measure(plan, ranks)
    assert report.efficiency <= report.bound <= 1


def exact_cost(plan: Plan, pack: NDArray[np.int32]) -> float:
    sizes = plan.tokens[pack].astype(float)
    return float((sizes + plan.cost.square * sizes**2 + plan.cost.tile * plan.tiles[pack]).sum())


@pytest.mark.parametrize("cost", [CostModel(), SMALL_LLM])
@pytest.mark.parametrize("ranks", [1, 3, 8, 64])
def test_figures_are_those_of_the_shares(ranks: int, cost: CostModel) -> None:
    """Compute the straggler factor by its definition from the trainer's shares and compare it with the report."""
    tokens, tiles = mixture(0, 3000)
    plan = make(tokens, tiles, capacity=16_384, batch_size=200, cost=cost)
    slowest = mean = 0.0
    for step in range(plan.num_steps):
        shares = plan.shares(step, ranks)
        costs = np.array([[exact_cost(plan, pack) for pack in share] for share in shares])
        slowest += costs.max(axis=0).sum()
        mean += costs.mean(axis=0).sum()
    report = measure(plan, ranks)
    assert report.straggler == pytest.approx(slowest / mean, rel=1e-5)
    assert report.utilisation == pytest.approx(mean / slowest, rel=1e-5)
    assert report.efficiency == pytest.approx(tokens.sum() / (plan.num_packs * 16_384))


def captions(seed: int, samples: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """No short samples: images of a few sizes with a caption."""
    rng = np.random.default_rng(seed)
    return rng.choice([1272, 1800, 2340, 2928], samples) + rng.integers(8, 200, samples), np.full(samples, 5)


def all_five_tile(seed: int, samples: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2100, 2900, samples) + rng.lognormal(4.7, 0.7, samples).astype(int)
    return tokens.clip(1, 4096), np.full(samples, 5)


def documents(seed: int, samples: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Many short texts and a few long documents: a pack may have forty samples."""
    rng = np.random.default_rng(seed)
    long = rng.random(samples) < 0.09
    tokens = np.where(long, rng.normal(3700, 60, samples), rng.lognormal(4.8, 0.5, samples)).astype(int)
    return tokens.clip(1, 4096), np.where(long, 5, 0)


def texts(seed: int, samples: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    return rng.lognormal(6, 1, samples).astype(int).clip(1, 4096), np.zeros(samples, np.int64)


MIXES = (mixture, captions, all_five_tile, documents, texts)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("capacity", [4096, 5120, 6719, 8192, 11_585, 16_384])
@pytest.mark.parametrize("samples", [1000, 20_000])
def test_packs_are_within_a_hundredth_of_the_bound(mix: Mix, capacity: int, samples: int) -> None:
    """At any capacity and for any lengths, allowing one pack more for the incomplete last ones."""
    tokens, tiles = mix(1, samples)
    plan = make(tokens, tiles, capacity=capacity, packs_per_step=16)
    fewest = round(tokens.sum() / capacity / bound_efficiency(tokens, capacity).efficiency)
    assert plan.num_packs <= fewest / 0.99 + 1


@pytest.mark.parametrize(("capacity", "least"), [(16_384, 0.997), (12_288, 0.995), (8192, 0.97), (4096, 0.6)])
def test_packs_are_full_where_lengths_allow_it(capacity: int, least: float) -> None:
    tokens, tiles = mixture(1, 40_000)
    plan = make(tokens, tiles, capacity=capacity, packs_per_step=64)
    assert tokens.sum() / (plan.num_packs * capacity) >= least


def test_equal_images_are_packed_perfectly() -> None:
    plan = make([2928] * 1000, [5] * 1000, capacity=16_384)
    assert plan.num_packs == 200
    assert measure(plan, 4).bound == pytest.approx(1000 * 2928 / (200 * 16_384), rel=0.003)


@pytest.mark.parametrize(("cost", "limits"), [(CostModel(), {8: 1.003, 64: 1.01}), (SMALL_LLM, {8: 1.005})])
def test_concurrent_packs_cost_the_same(cost: CostModel, limits: dict[int, float]) -> None:
    """A pack has room for 6 to 7 five-tile images: with expensive tiles, 64 ranks cannot be balanced exactly."""
    tokens, tiles = mixture(2, 40_000)
    plan = make(tokens, tiles, capacity=16_384, packs_per_step=64, cost=cost)
    assert measure(plan, 8).efficiency > 0.997
    whole_steps = 1 + 64 / plan.num_packs  # the last step may be short
    for ranks, limit in limits.items():
        assert measure(plan, ranks).straggler < limit * whole_steps


def test_the_most_expensive_packs_share_steps() -> None:
    """Text and five-tile images: six per pack, but seven in a few packs, for which all 64 ranks would wait."""
    rng = np.random.default_rng(0)
    text = rng.random(60_000) < 0.1
    image = rng.choice([2340, 2340, 2736, 2928], len(text)) + rng.lognormal(4.7, 0.7, len(text))
    tokens = np.where(text, rng.lognormal(5.6, 0.7, len(text)), image).astype(int).clip(8, 4096)
    plan = make(tokens, np.where(text, 0, 5), capacity=16_384, packs_per_step=64, cost=SMALL_LLM)
    full = plan.num_packs // 64
    cost = np.sort(plan.costs[: full * 64].reshape(full, 64), axis=1)
    assert cost[:, -1].sum() / cost.mean(axis=1).sum() < 1.02  # 1.05 with one such pack in every step


@pytest.mark.parametrize("mix", [mixture, captions, all_five_tile, texts])
@pytest.mark.parametrize(("capacity", "seed"), [(5120, 0), (8192, 1), (16_384, 2)])
def test_steps_are_as_random_as_a_shuffle(mix: Mix, capacity: int, seed: int) -> None:
    """Variances over steps stay below 1.5 times those of random steps with as many samples."""
    tokens, tiles = mix(seed, 40_000)
    per_step = max(4, int(tokens.sum() / capacity) // 300)
    plan = make(tokens, tiles, capacity=capacity, packs_per_step=per_step, seed=seed)
    size = len(tokens) / plan.num_packs * per_step
    for values in (tokens, tiles == 0):
        if values.var() == 0:
            continue
        means = step_means(plan, values)
        assert means.var() * size / values.var() < 1.5
        order = np.argsort(np.argsort(means))
        assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 4 / len(order) ** 0.5


def test_no_sample_waits_longer_than_the_buffer() -> None:
    """Compare two plans of the same shuffle, one with single-sample packs, to see how far samples were moved."""
    tokens, tiles = mixture(5, 5000)
    shuffled = make(np.ones_like(tokens), tiles, capacity=1, packs_per_step=1).rows  # in the shuffled order
    place = np.empty(len(tokens), int)
    place[shuffled] = np.arange(len(tokens))
    plan = make(tokens, tiles, capacity=16_384)
    moved = np.abs(place[plan.rows] - np.arange(len(tokens)))
    assert moved.max() < 96 * 16  # the buffer's samples times those of a pack


def test_ranks_do_not_change_a_plan_and_everything_else_does() -> None:
    tokens, tiles = mixture(3, 2000)
    settings = {"capacity": 16_384, "batch_size": 100}
    plan = make(tokens, tiles, **settings)
    assert make(tokens, tiles, **settings).key == plan.key
    changed = tokens.copy()
    changed[7] += 1
    others = [
        make(changed, tiles, **settings),
        make(tokens, tiles + 1, **settings),
        *(make(tokens, tiles, **{**settings, **change}) for change in (
            {"seed": 1}, {"epoch": 1}, {"capacity": 16_000}, {"batch_size": 200}, {"packs_per_step": 3},
            {"cost": SMALL_LLM},
        )),
    ]  # fmt: skip
    assert len({plan.key, *(other.key for other in others)}) == len(others) + 1
    assert not np.array_equal(plan.rows, make(tokens, tiles, seed=1, **settings).rows)
    assert not np.array_equal(plan.rows, make(tokens, tiles, epoch=1, **settings).rows)


@pytest.mark.parametrize("threads", ["1", "2"])
def test_other_processes_make_the_same_plan(threads: str) -> None:
    script = (
        "import hashlib, numpy as np\n"
        "from anyres_vlm.data.packing.plan import plan_epoch\n"
        "from anyres_vlm.data.packing.cost import CostModel\n"
        "t = np.arange(4000, dtype=np.int64) * 7919 % 3000 + 1\n"
        "p = plan_epoch(t, t % 6, capacity=8192, batch_size=64, seed=3, epoch=1, cost=CostModel())\n"
        "print(hashlib.sha256(p.rows.tobytes() + p.starts.tobytes() + p.costs.tobytes()).hexdigest(), p.key)"
    )
    environment = {**os.environ, "NUMBA_NUM_THREADS": threads}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    tokens = np.arange(4000, dtype=np.int64) * 7919 % 3000 + 1
    plan = make(tokens, tokens % 6, capacity=8192, batch_size=64, seed=3, epoch=1)
    content = plan.rows.tobytes() + plan.starts.tobytes() + plan.costs.tobytes()
    assert run.stdout.split() == [hashlib.sha256(content).hexdigest(), plan.key]


@pytest.mark.parametrize(
    ("exact", "packs"),
    [(0.2, 1), (1.0, 1), (1.4, 1), (19.05, 16), (38.1, 32), (64.0, 64), (52.5, 48), (9.5, 8), (5, 5)],
)
def test_packs_per_step_are_rounded(exact: float, packs: int) -> None:
    assert round_packs(exact) == packs


@pytest.mark.parametrize(
    ("tokens", "changes", "message"),
    [
        ([3, 101], {}, "sample 1 has 101 tokens, more than the capacity of 100: raise the capacity to 101"),
        ([3, 0], {}, "sample 1 has 0 tokens: every sample needs at least 1"),
        ([], {}, "expected the same number, at least 1"),
        ([3], {"tiles": [-1]}, "sample 0 has -1 tiles"),
        ([3], {"batch_size": 0}, "batch size 0: expected at least 1"),
        ([3], {"packs_per_step": 0}, "packs per step 0"),
    ],
)
def test_invalid_arguments_are_refused(tokens: list[int], changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make(tokens, **changes)


def test_advice_names_idle_places() -> None:
    tokens, tiles = mixture(4, 3000)
    assert not measure(make(tokens, tiles, capacity=16_384, batch_size=110), 8).advice
    odd = measure(make(tokens, tiles, capacity=16_384, packs_per_step=20, batch_size=135), 8)
    assert odd.idle_places == 4
    assert "4 of 24 places stay idle; try --packs-per-step 16" in odd.advice[0]
    tight = measure(make(tokens, tiles, capacity=4096, packs_per_step=8, batch_size=10), 8)
    assert "no plan fills packs of 4,096 tokens above" in tight.advice[-1]
