"""Hostile configurations end in one line."""

from __future__ import annotations

from pathlib import Path

import configurations
import pytest
from configurations import LAUGHS, TARGETS, TEXTS, check_text
from target import explore
from watch import watched

from anyres_vlm.cli.main import main
from anyres_vlm.config import load_config, shipped_config
from anyres_vlm.errors import UsageError
from anyres_vlm.files import parse_yaml


@pytest.mark.parametrize("name", TARGETS)
def test_any_input_is_taken_or_refused(name: str) -> None:
    tally = explore(TARGETS[name], examples=60, fixed=True)
    assert tally.rejected > 5
    assert not tally.faults, tally.faults


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_each_known_trick_is_refused(text: str, tmp_path: Path) -> None:
    with watched(tmp_path):
        assert not check_text(text, tmp_path)


@pytest.mark.parametrize("value", configurations.VALUES, ids=repr)
def test_every_value_at_some_keys(value: object, tmp_path: Path) -> None:
    with watched(tmp_path):
        for at in (3, 11, 17):
            configurations.check_key((0, at, value), tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LAUGHS, "100,000 entries"),
        ("a: &a [*a]", "an alias refers to a node that contains it"),
        ("seed: 1\nseed: 2", "duplicate key 'seed'"),
        ("[" * 2000, "nested too deeply"),
        ("a: !!python/object/apply:os.system [x]", "could not determine a constructor"),
    ],
)
def test_the_reason_is_said(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_yaml(text)


def test_small_aliases_and_merges_stay() -> None:
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: [*a, *a]"
    assert parse_yaml(text) == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": [{"x": 1, "y": 2}] * 2}


@pytest.mark.parametrize("number", [".nan", ".inf", "-.inf", "-1", "1e400"])
def test_numbers_that_are_none(number: str) -> None:
    for key in ("stage1.learning_rate", "stage1.max_grad_norm", "rank_timeout_minutes", "stage2.weight_decay"):
        with pytest.raises(UsageError, match=key):
            load_config(shipped_config("tiny"), [f"{key}={number}"])


def test_the_command_ends_with_2_and_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(LAUGHS)
    assert main(["train", "--config", str(tmp_path / "c.yaml"), "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
