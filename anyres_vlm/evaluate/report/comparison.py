"""Two runs that answered the same questions: the difference, its interval, and where it comes from."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from anyres_vlm.evaluate.report.bootstrap import Interval, draw, interval, shares
from anyres_vlm.evaluate.report.measure import has_marks, kind_ratios, kinds_of, score_ratios, units
from anyres_vlm.evaluate.report.results import Answer, Result

KINDS = 12  # shown, those that differ most
FEWEST = 2  # questions in common


@dataclass(frozen=True)
class KindDifference:
    """Questions of a kind: mean points of both runs in percent, and the interval of the difference."""

    kind: str
    questions: int
    first: float
    second: float
    interval: Interval | None


@dataclass(frozen=True)
class Comparison:
    """`second` less `first` in points of the score, over their common questions; or of mean points, for want of marks.

    `better`, `worse` count questions that the second answers better or worse; `pairs` are the common answers by
    question.
    """

    first: Result
    second: Result
    measure: str
    difference: float
    interval: Interval | None
    better: int
    worse: int
    drawn: str
    kinds: list[KindDifference]
    pairs: dict[str, tuple[Answer, Answer]]

    @property
    def equal(self) -> int:
        """Questions on which both have as many points."""
        return len(self.pairs) - self.better - self.worse


def compare(first: Result, second: Result) -> Comparison | None:
    """None where the runs have fewer than two questions with the same truth in common."""
    pairs = {
        name: (answer, second.answers[name])
        for name, answer in first.answers.items()
        if name in second.answers and _is_same(answer, second.answers[name])
    }
    if len(pairs) < FEWEST:
        return None
    left, right = ([pair[side] for pair in pairs.values()] for side in (0, 1))
    drawn, called = units({name: pair[0] for name, pair in pairs.items()})
    benchmark = first.benchmark if has_marks(left) and has_marks(right) else ""
    score = [score_ratios(benchmark, answers) for answers in (left, right)]
    by_kind = [kind_ratios(answers, of=left) for answers in (left, right)]
    both = np.concatenate([*score, *by_kind], axis=1)
    ends = np.cumsum([part.shape[1] for part in (*score, *by_kind)])[:-1]
    score_1, score_2, kinds_1, kinds_2 = np.split(shares(draw(both, drawn)), ends, axis=1)
    now_1, now_2, kind_1, kind_2 = np.split(shares(both.sum(axis=0)), ends)
    kinds = [
        KindDifference(
            kind,
            int(by_kind[0][:, place, 1].sum()),
            float(kind_1[place]),
            float(kind_2[place]),
            interval(kinds_2[:, place] - kinds_1[:, place]),
        )
        for place, kind in enumerate(kinds_of(left))
    ]
    kinds.sort(key=lambda kind: -abs(kind.second - kind.first) * kind.questions**0.5)
    better = sum(b.points > a.points for a, b in pairs.values())
    return Comparison(
        first,
        second,
        "score" if benchmark else "mean points",
        float(now_2.mean() - now_1.mean()),
        interval(score_2.mean(axis=1) - score_1.mean(axis=1)),
        better,
        sum(b.points < a.points for a, b in pairs.values()),
        called,
        kinds[:KINDS],
        pairs,
    )


def most_different(comparison: Comparison, count: int) -> list[tuple[str, Answer, Answer]]:
    """Questions of which one run has most points more, as many in favour of either while there are; ties by chance."""
    names = list(comparison.pairs)
    random.Random(0).shuffle(names)
    by_gap = sorted(names, key=lambda name: -abs(_gap(*comparison.pairs[name])))
    sides = [[name for name in by_gap if sign * _gap(*comparison.pairs[name]) > 0] for sign in (1, -1)]
    half = [max(count // 2, count - len(other)) for other in reversed(sides)]
    return [(name, *comparison.pairs[name]) for side, size in zip(sides, half, strict=True) for name in side[:size]][
        :count
    ]


def worst(answers: Sequence[Answer], count: int) -> list[Answer]:
    """Answers with fewest points, of as many kinds as there are; among equals by chance, the same each time."""
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


def _is_same(a: Answer, b: Answer) -> bool:
    return a.reference == b.reference or not (a.reference and b.reference)


def _gap(a: Answer, b: Answer) -> float:
    return b.points - a.points
