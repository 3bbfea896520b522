"""One benchmark's part of the page: scores with intervals, caveats, kinds of question, differences, failures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from anyres_vlm.evaluate.report.bootstrap import Interval, draw, interval, shares
from anyres_vlm.evaluate.report.caveats import beside_published, between
from anyres_vlm.evaluate.report.comparison import Comparison, compare, most_different, worst
from anyres_vlm.evaluate.report.measure import has_marks, kind_ratios, kinds_of, score_ratios, units
from anyres_vlm.evaluate.report.pictures import Pictures
from anyres_vlm.evaluate.report.published import PUBLISHED, Guide, guide
from anyres_vlm.evaluate.report.results import Answer, Result

NORMAL = 1.96  # standard errors of a 95% interval
RATES = ("accuracy", "precision", "recall", "f1", "yes_ratio")
MOST_KINDS = 24  # in the table, those with most questions


@dataclass(frozen=True)
class Scores:
    """One result with its interval. `drawn` and `units` say what the bootstrap draws and how many there are.

    `reading` says in words how large a gap means something. `rates` are POPE's in the order of RATES, by split.
    """

    result: Result
    interval: Interval | None
    drawn: str
    units: int
    caveats: list[str]
    reading: str
    rates: list[tuple[str, list[float | None]]]


@dataclass(frozen=True)
class Kind:
    """A kind of question: how many, and each run's mean points in percent."""

    name: str
    questions: int
    means: list[float | None]


@dataclass(frozen=True)
class Example:
    """A question with what several runs said, and its picture as a data URL or why there is none."""

    answers: list[tuple[str, Answer]]
    picture: str
    remark: str


@dataclass(frozen=True)
class Difference:
    """Two runs compared, and the questions on which they differ most."""

    comparison: Comparison
    examples: list[Example]


@dataclass(frozen=True)
class Section:
    """Everything about one benchmark. `incomparable` names pairs of runs that have no question in common."""

    name: str
    guide: Guide
    scores: list[Scores]
    warnings: list[str]
    kinds: list[Kind]
    differences: list[Difference]
    incomparable: list[tuple[str, str]]
    failures: list[tuple[Result, list[Example]]]

    @property
    def caveats(self) -> dict[str, list[str]]:
        """Why runs are not like the published ones, and which."""
        found: dict[str, list[str]] = {}
        for score in self.scores:
            for caveat in score.caveats:
                found.setdefault(caveat, []).append(score.result.label)
        return found


def make(name: str, results: Sequence[Result], pictures: Pictures, examples: int) -> Section:
    """The part of one benchmark; every later run is compared with the first."""
    compared = [(other, compare(results[0], other)) for other in results[1:]]
    return Section(
        name,
        guide(name),
        [_score(result) for result in results],
        between(results),
        _kinds(results),
        [Difference(found, _differing(found, pictures, examples)) for _, found in compared if found],
        [(results[0].label, other.label) for other, found in compared if not found],
        [(result, _failing(result, pictures, examples)) for result in results],
    )


def _score(result: Result) -> Scores:
    answers = list(result.answers.values())
    drawn, called = units(result.answers)
    caveats, count = beside_published(result), len(set(drawn))
    if nothing := _no_interval(result, answers, count):
        return Scores(result, None, called, count, caveats, nothing, _rates(result))
    ratios = score_ratios(result.benchmark, answers)
    found = interval(shares(draw(ratios, drawn)).mean(axis=1))
    return Scores(result, found, called, count, caveats, _reading(result, found, count, called), _rates(result))


def _no_interval(result: Result, answers: Sequence[Answer], count: int) -> str:
    """Why there is none, if there is none."""
    if result.score is None:
        return "no score: F1 needs a right yes in each split" if result.scores else "no score: no truth or no judge"
    if result.benchmark == "pope" and not has_marks(answers):
        return "no interval: F1's needs marks.jsonl beside the result: score it again"
    return "no interval: it takes two pictures at least" if count < 2 else ""


def _rates(result: Result) -> list[tuple[str, list[float | None]]]:
    """POPE's rates in percent by split."""
    if result.benchmark != "pope":
        return []
    rows = {split: row for split, row in result.scores.items() if isinstance(row, dict)}
    return [(split, [_percent(row.get(rate)) for rate in RATES]) for split, row in rows.items()]


def _percent(value: Any) -> float | None:
    return 100 * value if isinstance(value, int | float) else None


def _noise(benchmark: str, found: Interval) -> float | None:
    """The smallest gap to a published score that is more than chance, in points; None where none is published.

    Both scores are samples: the published one of as many yes-or-no questions, which vary most.
    """
    published, sizes = PUBLISHED[0].score(benchmark), guide(benchmark).sizes
    if published is None or not sizes:
        return None
    share = published / 100
    theirs = NORMAL * 100 * (share * (1 - share) / sizes[0]) ** 0.5
    return float((found.margin**2 + theirs**2) ** 0.5)


def _reading(result: Result, found: Interval | None, count: int, called: str) -> str:
    if found is None:
        most = min(100.0, 300 / count)
        return (
            f"all {called} have equal points, so a bootstrap says nothing: {most:.0f}% of them could be otherwise and "
            "be missed (rule of three)"
        )
    told = f"a gap to another run on other questions under {2**0.5 * found.margin:.1f} points is noise"
    if noise := _noise(result.benchmark, found):
        told += f", to a published score under {noise:.1f}"
    floor = guide(result.benchmark).floor
    has_hints = result.protocol.get("ocr_tokens", "").startswith("in the prompt")
    if floor is None or has_hints:
        return told
    place = "above" if found.low > floor else "below" if found.high < floor else "not told apart from"
    return f"{told}; {place} {floor:g}, which needs no picture"


def _kinds(results: Sequence[Result]) -> list[Kind]:
    tables = []
    for result in results:
        answers = list(result.answers.values())
        names = kinds_of(answers)
        sums = kind_ratios(answers, answers).sum(axis=0) if names else []
        tables.append({name: (float(hits), int(count)) for name, (hits, count) in zip(names, sums, strict=True)})
    kinds = [
        Kind(
            name,
            max(table[name][1] for table in tables if name in table),
            [100 * table[name][0] / table[name][1] if name in table else None for table in tables],
        )
        for name in dict.fromkeys(name for table in tables for name in table)
    ]
    return sorted(kinds, key=lambda kind: -kind.questions)[:MOST_KINDS]


def _differing(found: Comparison, pictures: Pictures, count: int) -> list[Example]:
    return [
        _example([(found.first, one), (found.second, other)], pictures)
        for _, one, other in most_different(found, count)
    ]


def _failing(result: Result, pictures: Pictures, count: int) -> list[Example]:
    return [_example([(result, answer)], pictures) for answer in worst(list(result.answers.values()), count)]


def _example(said: list[tuple[Result, Answer]], pictures: Pictures) -> Example:
    """With the picture that the last run saw which was not blind."""
    result, answer = next((pair for pair in reversed(said) if not pair[0].blind), said[-1])
    picture, remark = pictures.show(answer.image, result.tiling)
    if result.blind and picture:
        remark = "another question's picture, for the run is blind"
    return Example([(result.label, answer) for result, answer in said], picture, remark)
