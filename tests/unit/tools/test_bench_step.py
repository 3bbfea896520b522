"""The step benchmark compares equals: it runs in small, and notices a way that computes something else."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import pytest
import step_loop
import step_loss
import step_pass
import step_ways
import torch
from step_ways import OURS, STOCK, Ways


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Ways:
    monkeypatch.setitem(step_ways.SHAPES, "wide_vocab", step_ways.Shape(256, 2, 500))
    return Ways("wide_vocab", 8, 0, [OURS, *STOCK])


def test_all_ways_are_equal_and_a_different_one_is_noticed(ways: Ways) -> None:
    found = step_pass.differences(ways, [OURS, *STOCK])
    assert found[OURS]["gradients_differ"] == 0
    assert all(0 < found[name]["gradients_differ"] < step_pass.GRADIENT_RTOL for name in STOCK)
    with torch.no_grad():
        next(ways.stock.parameters()).add_(0.1)
    with pytest.raises(AssertionError, match="stock, packed: loss"):
        step_pass.differences(ways, ["stock, packed"])


def test_the_samples_are_what_the_tool_says() -> None:
    samples = [sample for sample, _ in step_ways.make_samples(600, 4096, 1)]
    tokens = sum(sample.length for sample in samples)
    visual = sum(plan.total_tokens for sample in samples for plan in sample.plans) / tokens
    assert 0.60 < visual < 0.65
    assert 0.10 < sum(sample.num_supervised for sample in samples) / tokens < 0.2


def test_loss_is_measured_in_small(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = argparse.Namespace(tokens=2000, words=3000, hidden=16, supervised=0.15, runs=1, threads=1)
    result = step_loss.run(arguments)
    step_loss.show(result)
    assert "times as fast with" in capsys.readouterr().out
    assert result["memory_share"] < 0.5
    assert result["ratios"]["memory"] == [pytest.approx(1 / result["memory_share"])]


@pytest.mark.slow
def test_the_loop_s_shares_add_up() -> None:
    few = [f"stage{stage}.{key}" for stage in (1, 2) for key in ("batch_size=1", "max_length=600", "capacity=700")]
    figures = step_loop.run(argparse.Namespace(steps=step_loop.WARM_UP + 2, settings=few))
    assert figures["stages"].keys() == {"stage1", "stage2"}
    for row in figures["stages"].values():
        assert row["steps"] == 2
        assert 0 < row["loop"] < 1
        assert 0.3 < row["work"] < 1
        assert row["work"] + row["wait"] + row["loop"] == pytest.approx(1)
