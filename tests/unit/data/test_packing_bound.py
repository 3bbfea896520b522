"""The bound is never below the optimum of an exhaustive search, and close to known optima."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from anyres_vlm.data.packing.bound import bound_efficiency


def fewest_packs(tokens: list[int], capacity: int) -> int:
    """Try every placement of every sample, longest first."""
    best = len(tokens)
    order = sorted(tokens, reverse=True)

    def place(index: int, loads: tuple[int, ...]) -> None:
        nonlocal best
        if len(loads) >= best:
            return
        if index == len(order):
            best = len(loads)
            return
        for pack in {load: number for number, load in enumerate(loads)}.values():
            if loads[pack] + order[index] <= capacity:
                place(index + 1, tuple(sorted((*loads[:pack], loads[pack] + order[index], *loads[pack + 1 :]))))
        place(index + 1, (*loads, order[index]))

    place(0, ())
    return best


@settings(max_examples=200, deadline=None)
@given(tokens=st.lists(st.integers(1, 60), min_size=1, max_size=8), capacity=st.integers(60, 100))
def test_bound_is_never_below_the_optimum(tokens: list[int], capacity: int) -> None:
    optimum = sum(tokens) / (fewest_packs(tokens, capacity) * capacity)
    for classes in (2, 4, 128):  # two classes round the lengths hard
        assert bound_efficiency(np.array(tokens), capacity, classes).efficiency >= optimum - 1e-9


@pytest.mark.parametrize(
    ("lengths", "counts", "capacity", "efficiency"),
    [
        ([2928], [1000], 16_384, 5 * 2928 / 16_384),  # five to a pack, never six
        ([2561], [1000], 5120, 2561 / 5120),  # just over a half
        ([2340], [1000], 4096, 2340 / 4096),  # one to a pack
        ([60, 40], [500, 500], 100, 1.0),
        ([60, 30], [500, 500], 100, 0.9),  # one pair to a pack
        ([70, 40, 30], [300, 100, 100], 100, (70 * 300 + 40 * 100 + 30 * 100) / (350 * 100)),  # 40 + 40 share a pack
    ],
)
def test_known_optima(lengths: list[int], counts: list[int], capacity: int, efficiency: float) -> None:
    tokens = np.repeat(lengths, counts)
    found = bound_efficiency(tokens, capacity).efficiency
    assert efficiency - 1e-9 <= found <= efficiency * 1.003


def test_prices_are_feasible_for_real_lengths() -> None:
    """No pack of real lengths is worth more than its capacity: the proof of the bound, on random packs."""
    rng = np.random.default_rng(0)
    tokens = np.concatenate([rng.integers(2300, 3100, 5000), rng.integers(10, 900, 800)])
    values = bound_efficiency(tokens, 8192).values(8192)
    for _ in range(3000):
        pack, room = 0, 8192
        for length in rng.choice(tokens, 12):
            if length <= room:
                room -= length
                pack += values[length]
        assert pack <= 8192
    assert (np.diff(values) >= 0).all()
