"""Bootstrap intervals of scores, and paired comparisons of two runs on the same questions.

A score is written as ratios of sums over questions. The bootstrap draws images with replacement, each with all of its
questions, and recomputes the ratios.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anyres_vlm.evaluate.benchmarks.base import Mark
from anyres_vlm.evaluate.benchmarks.pope import yes_or_no
from anyres_vlm.evaluate.report.results import Result

DRAWS = 2000
CHUNK = 50  # draws at once; 16 MB for the 40,504 images of VQAv2
PERCENTILES = (2.5, 97.5)
EQUAL = 1e-9  # percent: differences below this are rounding
MAX_KINDS = 12  # kinds of question in a comparison, those that differ most
MIN_COMMON = 2  # questions that two runs must have in common

Ratios = NDArray[np.float64]
"""Numerators and denominators of several ratios, (questions, ratios, 2); of bootstrap draws (DRAWS, ratios, 2)."""


@dataclass(frozen=True)
class Interval:
    """A 95% interval, in percent."""

    low: float
    high: float

    @property
    def margin(self) -> float:
        """Half of the length."""
        return (self.high - self.low) / 2

    @property
    def has_zero(self) -> bool:
        """Whether zero lies in the interval."""
        return self.low <= 0 <= self.high


def draw(ratios: Ratios, units: Sequence[str], seed: int = 0) -> Ratios:
    """Return sums of numerators and denominators over DRAWS bootstrap samples, (DRAWS, ratios, 2).

    `units` names for each question the unit that is drawn as a whole: its image, or the question.
    """
    places = {unit: place for place, unit in enumerate(dict.fromkeys(units))}
    unit, count = [places[unit] for unit in units], len(places)
    columns = ratios.reshape(len(ratios), -1)
    by_unit = np.stack([np.bincount(unit, column, count) for column in columns.T], axis=1)
    rng = np.random.default_rng(seed)
    sums = np.concatenate([_times_drawn(rng, count) @ by_unit for _ in range(DRAWS // CHUNK)])
    return sums.reshape(DRAWS, *ratios.shape[1:])


def _times_drawn(rng: np.random.Generator, units: int) -> NDArray[np.float64]:
    """Return how often each unit is in each sample, (CHUNK, units)."""
    samples = [np.bincount(rng.integers(units, size=units), minlength=units) for _ in range(CHUNK)]
    return np.array(samples, np.float64)


def shares(sums: Ratios) -> NDArray[np.float64]:
    """Return each ratio in percent, (..., ratios, 2) -> (..., ratios); NaN if the denominator is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        quotients: NDArray[np.float64] = 100 * sums[..., 0] / sums[..., 1]
    return quotients


def interval(draws: NDArray[np.float64]) -> Interval | None:
    """Return the percentile interval of drawn values, (DRAWS,); None if all are equal, as that says nothing."""
    known = draws[np.isfinite(draws)]
    if not len(known) or np.ptp(known) < EQUAL:
        return None
    low, high = np.percentile(known, PERCENTILES)
    return Interval(float(low), float(high))


def score_ratios(benchmark: str, answers: Sequence[Mark]) -> Ratios:
    """Return ratios whose mean is the score, (questions, ratios, 2): points over questions, or F1 of each POPE split.

    F1 is 2 hits / (said yes + truly yes), which needs the marks of the answers.
    """
    if benchmark == "pope":
        said = np.array([yes_or_no(answer.text) == "yes" for answer in answers], np.float64)
        true = np.array([answer.reference == "yes" for answer in answers], np.float64)
        return _by_kind(np.stack([2 * said * true, said + true], axis=1), answers)
    return _points(answers)[:, None, :]


def has_marks(answers: Sequence[Mark]) -> bool:
    """Return whether the answers themselves are known, not only their points."""
    return all(answer.reference for answer in answers)


def kinds_of(answers: Sequence[Mark]) -> list[str]:
    """Return the kinds of question in order of appearance."""
    return list(dict.fromkeys(kind for answer in answers for kind in answer.kinds))


def kind_ratios(answers: Sequence[Mark], kinds_from: Sequence[Mark]) -> Ratios:
    """Return points over questions of each kind, (questions, kinds, 2); the kinds come from `kinds_from`."""
    return _by_kind(_points(answers), kinds_from)


def _points(answers: Sequence[Mark]) -> NDArray[np.float64]:
    return np.array([[answer.points, 1.0] for answer in answers])


def _by_kind(pairs: NDArray[np.float64], answers: Sequence[Mark]) -> Ratios:
    """Spread (questions, 2) over the kinds, (questions, kinds, 2), with zeros where a question is not of a kind."""
    places = {kind: place for place, kind in enumerate(kinds_of(answers))}
    spread = np.zeros((len(answers), len(places), 2))
    for number, answer in enumerate(answers):
        spread[number, [places[kind] for kind in answer.kinds]] = pairs[number]
    return spread


def bootstrap_units(answers: Mapping[str, Mark]) -> tuple[list[str], str]:
    """Return the unit of each question and its name: images if all are known, else questions."""
    if all(answer.image for answer in answers.values()):
        return [answer.image for answer in answers.values()], "images"
    return list(answers), "questions"


@dataclass(frozen=True)
class KindDifference:
    """One kind of question: mean points of both runs in percent, and the interval of the difference."""

    kind: str
    questions: int
    first: float
    second: float
    interval: Interval | None


@dataclass(frozen=True)
class Comparison:
    """`second` minus `first` in score points over their common questions; in mean points if marks are missing.

    `better` and `worse` count questions by the points of the second run; `pairs` are the answers by question.
    """

    first: Result
    second: Result
    measure: str
    difference: float
    interval: Interval | None
    better: int
    worse: int
    units: str
    kinds: list[KindDifference]
    pairs: dict[str, tuple[Mark, Mark]]

    @property
    def equal(self) -> int:
        """Questions with equal points in both runs."""
        return len(self.pairs) - self.better - self.worse


def compare(first: Result, second: Result) -> Comparison | None:
    """Compare two runs; None if they have fewer than two questions with the same reference answer in common."""
    pairs = {
        name: (answer, second.answers[name])
        for name, answer in first.answers.items()
        if name in second.answers and _is_same_question(answer, second.answers[name])
    }
    if len(pairs) < MIN_COMMON:
        return None
    left, right = ([pair[side] for pair in pairs.values()] for side in (0, 1))
    units, unit_name = bootstrap_units({name: pair[0] for name, pair in pairs.items()})
    benchmark = first.benchmark if has_marks(left) and has_marks(right) else ""
    score = [score_ratios(benchmark, answers) for answers in (left, right)]
    by_kind = [kind_ratios(answers, kinds_from=left) for answers in (left, right)]
    both = np.concatenate([*score, *by_kind], axis=1)
    ends = np.cumsum([part.shape[1] for part in (*score, *by_kind)])[:-1]
    drawn_1, drawn_2, drawn_kinds_1, drawn_kinds_2 = np.split(shares(draw(both, units)), ends, axis=1)
    score_1, score_2, kinds_1, kinds_2 = np.split(shares(both.sum(axis=0)), ends)
    kinds = [
        KindDifference(
            kind,
            int(by_kind[0][:, place, 1].sum()),
            float(kinds_1[place]),
            float(kinds_2[place]),
            interval(drawn_kinds_2[:, place] - drawn_kinds_1[:, place]),
        )
        for place, kind in enumerate(kinds_of(left))
    ]
    kinds.sort(key=lambda kind: -abs(kind.second - kind.first) * kind.questions**0.5)
    return Comparison(
        first,
        second,
        "score" if benchmark else "mean points",
        float(score_2.mean() - score_1.mean()),
        interval(drawn_2.mean(axis=1) - drawn_1.mean(axis=1)),
        sum(b.points > a.points for a, b in pairs.values()),
        sum(b.points < a.points for a, b in pairs.values()),
        unit_name,
        kinds[:MAX_KINDS],
        pairs,
    )


def most_different(comparison: Comparison, count: int) -> list[tuple[str, Mark, Mark]]:
    """Return the questions with the largest gaps, half in favour of each run if there are enough; ties at random."""
    names = list(comparison.pairs)
    random.Random(0).shuffle(names)
    gaps = {name: second.points - first.points for name, (first, second) in comparison.pairs.items()}
    by_gap = sorted(names, key=lambda name: -abs(gaps[name]))
    sides = [[name for name in by_gap if sign * gaps[name] > 0] for sign in (1, -1)]
    sizes = [max(count // 2, count - len(other)) for other in reversed(sides)]
    found = [name for side, size in zip(sides, sizes, strict=True) for name in side[:size]]
    return [(name, *comparison.pairs[name]) for name in found[:count]]


def worst(answers: Sequence[Mark], count: int) -> list[Mark]:
    """Return the answers with fewest points, spread over the kinds; ties at random, but the same each time."""
    missed = [answer for answer in answers if answer.points < 1 and (answer.question or answer.reference)]
    random.Random(0).shuffle(missed)
    missed.sort(key=lambda answer: answer.points)
    seen: Counter[tuple[str, ...]] = Counter()
    turns = []
    for answer in missed:
        seen[answer.kinds] += 1
        turns.append((answer.points, seen[answer.kinds]))
    order = sorted(range(len(missed)), key=turns.__getitem__)
    return [missed[place] for place in order[:count]]


def _is_same_question(a: Mark, b: Mark) -> bool:
    return a.reference == b.reference or not (a.reference and b.reference)
