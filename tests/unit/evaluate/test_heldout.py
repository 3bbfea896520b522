"""Scores of short answers and the blind baseline."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from anyres_vlm.errors import DataError
from anyres_vlm.evaluate.answers import Answered
from anyres_vlm.evaluate.benchmarks.heldout import Heldout, gain, normalise, read_correct


def dataset(folder: Path, truths: list[str], ids: list[str] | None = None) -> Path:
    """Questions of the tasks x and y in turn, each with an image of its own."""
    records = [
        {
            "id": (ids or [f"q{n}" for n in range(len(truths))])[n],
            "image": f"{n}.png",
            "task": "xy"[n % 2],
            "conversations": [{"from": "human", "value": f"<image>\n{n}?"}, {"from": "gpt", "value": truth}],
        }
        for n, truth in enumerate(truths)
    ]
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path


@pytest.mark.parametrize(
    ("expected", "answer", "is_correct"),
    [
        ("red", "Red.", True),
        ("top left", " top  left ", True),
        ("$4.30", "$4.30.", True),
        ("$4.30", "4.30", False),
        ("40", "4", False),
        ("yes", "yes, it is", False),
        ("BAKERY OPEN", "bakery open", True),
        ("BAKERY", "", False),
    ],
)
def test_answers_match_except_for_case_and_outer_punctuation(expected: str, answer: str, is_correct: bool) -> None:
    assert (normalise(answer) == normalise(expected)) is is_correct


def test_scores_by_task(tmp_path: Path) -> None:
    data = dataset(tmp_path, ["a", "b", "c", "d", "e"])
    said = {"q4": "E.", "q0": "a", "q1": "b", "q2": "no", "q3": "no"}
    given = [Answered(name, text, raw=True, image="seen.png") for name, text in said.items()]
    scored = Heldout().score([data], given, partial=False)
    assert scored.score == 60.0
    assert scored.scores == {"x": 2 / 3, "y": 1 / 2, "all": 3 / 5}
    assert {name: mark.points for name, mark in scored.marks.items()} == {"q4": 1, "q0": 1, "q1": 1, "q2": 0, "q3": 0}
    assert scored.marks["q2"].reference == "c"
    assert Heldout().score([data], given[:3], partial=True).scores == {"x": 1.0, "y": 1.0, "all": 1.0}
    with pytest.raises(DataError, match="2 questions without an answer"):
        Heldout().score([data], given[:3], partial=False)


def test_swapping_moves_every_image_within_its_task(tmp_path: Path) -> None:
    data = dataset(tmp_path, list("abcdef"))
    before, after = (Heldout(swap).questions(data, None, None) for swap in (False, True))
    assert [(one.id, one.turn) for one in before] == [(one.id, one.turn) for one in after]
    assert all(one.images != other.images for one, other in zip(before, after, strict=True))
    for task in (0, 1):
        assert {one.images for one in before[task::2]} == {one.images for one in after[task::2]}
    with pytest.raises(DataError, match="task 'x' has one question"):
        Heldout(swap_images=True).questions(data, None, 1)


def test_repeated_ids_are_told_apart(tmp_path: Path) -> None:
    data = dataset(tmp_path, ["a", "b", "c"], ["q", "q", "q"])
    names = [question.id for question in Heldout().questions(data, None, None)]
    assert names == ["q", "q#2", "q#3"]
    given = [Answered(str(name), text, raw=True) for name, text in zip(names, "abx", strict=True)]
    assert Heldout().score([data], given, partial=False).scores["all"] == 2 / 3


def test_a_gain_is_measured_on_the_same_questions(tmp_path: Path) -> None:
    correct = {str(n): n < 30 for n in range(100)}
    others = {str(n): 20 <= n < 40 for n in range(100)}
    more, margin = gain(correct, others)
    assert more == pytest.approx(0.1)
    each = [1] * 20 + [0] * 10 + [-1] * 10 + [0] * 60
    assert margin == pytest.approx(1.96 * np.std(each, ddof=1) / 10)
    with pytest.raises(DataError, match="answered 99 questions, not the same 100"):
        gain(correct, {str(n): True for n in range(1, 100)})


@pytest.mark.parametrize(
    "content",
    [
        {"benchmark": "heldout", "points": {"3": 1.0, "4": 0.0}},
        {"accuracy": {}, "answers": [{"id": "3", "correct": True}, {"id": "4", "correct": False}]},  # earlier versions
    ],
)
def test_results_of_both_formats_are_compared(tmp_path: Path, content: object) -> None:
    file = tmp_path / "eval.json"
    file.write_text(json.dumps(content))
    assert read_correct(file) == {"3": True, "4": False}


@pytest.mark.parametrize("content", ["[]", "{", '{"answers": [1]}', '{"points": 3}'])
def test_other_files_are_not_compared(tmp_path: Path, content: str) -> None:
    file = tmp_path / "eval.json"
    file.write_text(content)
    with pytest.raises(DataError, match="expected a result of anyres eval heldout"):
        read_correct(file)
