"""The generation benchmark compares equal answers, at a size that says nothing about speed."""

from __future__ import annotations

import decoding
import pytest
import torch

from anyres_vlm.errors import UsageError
from anyres_vlm.geometry import Size


@pytest.fixture
def _one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_thread")
def test_answers_are_compared(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = decoding.Shape(64, 96, 1, 2, 200, 64, 2)
    monkeypatch.setattr(decoding, "SHAPES", {"tiny": tiny})
    monkeypatch.setattr(decoding, "LEAST_ROUNDS", 1)
    monkeypatch.setattr(decoding, "ONE_IMAGE", [(5, Size(height=200, width=300))])
    monkeypatch.setattr(decoding, "BATCH", [(9, None), (5, Size(height=200, width=300))])
    figures = decoding.run(["tiny"], 1, 3)
    one, batch = figures["results"]
    assert (one["positions"], batch["positions"]) == (5 + 1464, 9 + 5 + 1464)
    for row in (one, batch):
        assert row["ratio"] == pytest.approx(row["ours_tokens_per_second"] / row["stock_tokens_per_second"])
    decoding.show(figures)
    assert "one image" in capsys.readouterr().out


def test_few_rounds_are_refused() -> None:
    with pytest.raises(UsageError, match="--rounds 4: at least 5"):
        decoding.run(["like_7b"], 4, 1)
