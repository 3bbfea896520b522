"""Packs: every sample once, never over the capacity, the same for the same seed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyres_vlm.data.packing import pack_steps
from anyres_vlm.errors import UsageError


@given(
    lengths=st.lists(st.integers(1, 50), max_size=200),
    batch_size=st.integers(1, 40),
    capacity=st.integers(50, 200),
    seed=st.integers(0, 5),
)
def test_every_sample_once_within_capacity(lengths: list[int], batch_size: int, capacity: int, seed: int) -> None:
    steps = pack_steps(lengths, batch_size, capacity, seed, epoch=0)
    assert sorted(sample for step in steps for pack in step for sample in pack) == list(range(len(lengths)))
    for position, step in enumerate(steps):
        assert sum(map(len, step)) == min(batch_size, len(lengths) - position * batch_size)
        loads = [sum(lengths[sample] for sample in pack) for pack in step]
        assert all(0 < load <= capacity for load in loads)
        # First fit leaves at most one pack half empty or emptier.
        assert sum(load <= capacity // 2 for load in loads) <= 1


def test_order_depends_on_seed_and_epoch_alone() -> None:
    lengths = list(range(1, 101))
    assert pack_steps(lengths, 10, 400, 0, 0) == pack_steps(lengths, 10, 400, 0, 0)
    assert pack_steps(lengths, 10, 400, 0, 0) != pack_steps(lengths, 10, 400, 0, 1)
    assert pack_steps(lengths, 10, 400, 0, 0) != pack_steps(lengths, 10, 400, 1, 0)


def test_a_sample_over_the_capacity_is_refused() -> None:
    with pytest.raises(UsageError, match="sample of 51 tokens exceeds capacity=50: raise it to at least 51"):
        pack_steps([3, 51], 2, 50, 0, 0)
