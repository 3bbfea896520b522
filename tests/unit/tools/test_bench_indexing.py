"""The measurement of indexing runs and adds up, at a size that says nothing about speed."""

from __future__ import annotations

import argparse

import data_indexing
import pytest


@pytest.mark.parametrize("tokenizer", ["bpe", "tiny"])
def test_both_loops_run_over_all_records(tokenizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    data_indexing.add_arguments(parser)
    arguments = parser.parse_args(["--images", "40", "--workers", "1", "--runs", "1", "--tokenizer", tokenizer])
    result = data_indexing.run(arguments)
    rates = [result[f"{name}_images_per_second"] for name in ("bare", "index")]
    assert result["ratio"] == pytest.approx(rates[1] / rates[0], rel=0.1)
    assert result["ratios"]["bare loop"] == [pytest.approx(result["ratio"], rel=0.1)]
    assert result["text_tokens_a_record"] > 50
    data_indexing.show(result)
    assert "ratio:" in capsys.readouterr().out
