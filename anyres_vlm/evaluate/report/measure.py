"""A benchmark's score as ratios of sums over questions, which is what a bootstrap can draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from anyres_vlm.evaluate.pope import yes_or_no
from anyres_vlm.evaluate.report.bootstrap import Ratios
from anyres_vlm.evaluate.report.results import Answer


def score_ratios(benchmark: str, answers: Sequence[Answer]) -> Ratios:
    """(questions, ratios, 2), whose mean is the score: points over questions, of POPE each split's F1.

    F1 is 2 hits / (said yes + true yes), for which answers need their marks.
    """
    if benchmark == "pope":
        said = np.array([yes_or_no(answer.text) == "yes" for answer in answers], np.float64)
        true = np.array([answer.reference == "yes" for answer in answers], np.float64)
        return _of_kinds(np.stack([2 * said * true, said + true], axis=1), answers)
    return _points(answers)[:, None, :]


def has_marks(answers: Sequence[Answer]) -> bool:
    """Whether it is known what was said, not only what it was worth."""
    return all(answer.reference for answer in answers)


def kinds_of(answers: Sequence[Answer]) -> list[str]:
    """The kinds of question in the order in which they come."""
    return list(dict.fromkeys(kind for answer in answers for kind in answer.kinds))


def kind_ratios(answers: Sequence[Answer], of: Sequence[Answer]) -> Ratios:
    """(questions, kinds, 2): points over questions of each kind, which `of` knows."""
    return _of_kinds(_points(answers), of)


def _points(answers: Sequence[Answer]) -> NDArray[np.float64]:
    return np.array([[answer.points, 1.0] for answer in answers])


def _of_kinds(pairs: NDArray[np.float64], answers: Sequence[Answer]) -> Ratios:
    """(questions, 2) -> (questions, kinds, 2): zeros where a question is not of a kind."""
    places = {kind: place for place, kind in enumerate(kinds_of(answers))}
    spread = np.zeros((len(answers), len(places), 2))
    for number, answer in enumerate(answers):
        spread[number, [places[kind] for kind in answer.kinds]] = pairs[number]
    return spread


def units(answers: Mapping[str, Answer]) -> tuple[list[str], str]:
    """What is drawn as a whole for each question, and what that is called: pictures where each is known."""
    if all(answer.image for answer in answers.values()):
        return [answer.image for answer in answers.values()], "pictures"
    return list(answers), "questions"
