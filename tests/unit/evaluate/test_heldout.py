"""Scores of short answers and the blind baseline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from anyres_vlm.errors import DataError
from anyres_vlm.evaluate.heldout import Result, accuracy_by_task, gain, read_correct, swap_images
from anyres_vlm.schema import ImageRef, Record, Turn


@pytest.mark.parametrize(
    ("expected", "answer", "correct"),
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
def test_answers_are_equal_but_for_case_and_outer_punctuation(expected: str, answer: str, correct: bool) -> None:
    assert Result("1", "sign", "?", expected, answer).correct is correct


def test_accuracy_by_task() -> None:
    results = [Result(str(n), task, "?", "a", answer) for n, (task, answer) in enumerate(["xa", "xb", "xa", "ya"])]
    assert accuracy_by_task(results) == {"x": 2 / 3, "y": 1.0, "all": 3 / 4}


def test_swapping_moves_every_picture_within_its_task() -> None:
    turns = (Turn("user", "<image>\n?"), Turn("assistant", "a"))
    records = [Record(str(n), (ImageRef(f"{n}.png", Path(f"{n}.png")),), turns, "xy"[n % 2]) for n in range(6)]
    swapped = swap_images(records)
    for before, after in zip(records, swapped, strict=True):
        assert (after.id, after.turns, after.task) == (before.id, before.turns, before.task)
        assert after.images != before.images
    by_task = {task: {r.images for r in records if r.task == task} for task in "xy"}
    assert {task: {r.images for r in swapped if r.task == task} for task in "xy"} == by_task
    with pytest.raises(DataError, match="one question"):
        swap_images(records[:1])


def test_a_gain_is_measured_on_the_same_questions(tmp_path: Path) -> None:
    results = [Result(str(n), "colour", "?", "red", "red" if n < 30 else "blue") for n in range(100)]
    others = {str(n): 20 <= n < 40 for n in range(100)}
    more, margin = gain(results, others)
    assert more == pytest.approx(0.1)
    each = [1] * 20 + [0] * 10 + [-1] * 10 + [0] * 60
    assert margin == pytest.approx(1.96 * np.std(each, ddof=1) / 10)
    with pytest.raises(DataError, match="answered 99 questions, not the same 100"):
        gain(results, {str(n): True for n in range(1, 100)})
    file = tmp_path / "eval.json"
    file.write_text('{"answers": [{"id": "3", "correct": true}, {"id": "4", "correct": false}]}')
    assert read_correct(file) == {"3": True, "4": False}
    file.write_text("[]")
    with pytest.raises(DataError, match="expected the answers that anyres eval heldout"):
        read_correct(file)
