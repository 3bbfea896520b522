"""What each choice changed: means and spreads over seeds, and whether a difference stands out of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, Literal

from anyres_vlm.ablate.cell import Choices, changes, chosen, expand, row_seeds, rows
from anyres_vlm.ablate.result import measure_key, numbers, read_scores
from anyres_vlm.ablate.run import SweepRun
from anyres_vlm.ablate.sweep import Sweep

MIN_SEEDS = 3  # with two, equal models are apart in one comparison of three; with three, in one of ten
Verdict = Literal["shown", "not shown", "too few seeds"]
BySeed = Mapping[int, float]


@dataclass(frozen=True)
class Number:
    """One number of one row. `spread` is the sample's standard deviation; `delta` is over the seeds of both rows."""

    by_seed: BySeed
    mean: float | None
    spread: float | None
    delta: float | None
    verdict: Verdict | None


@dataclass(frozen=True)
class Row:
    """One combination of variants. `changed` are its choices that are not the baseline's."""

    choices: Choices
    changed: Choices
    seeds: Sequence[int]
    numbers: Mapping[str, Number]
    published: Sequence[Mapping[str, Any]]
    notes: Sequence[str]


@dataclass(frozen=True)
class Table:
    """All rows, the baseline's first."""

    titles: Sequence[str]
    seeds: Sequence[int]
    rows: Sequence[Row]

    @property
    def missing(self) -> int:
        """Cells that are not measured yet."""
        return sum(len(row.seeds) - max(len(number.by_seed) for number in row.numbers.values()) for row in self.rows)


def make_table(run: SweepRun) -> Table:
    """The table of what is finished."""
    sweep = run.sweep
    titles = [title for measure in sweep.measure for title in measure.numbers]
    values: dict[tuple[str, ...], dict[str, dict[int, float]]] = {
        tuple(choices.values()): {title: {} for title in titles} for choices in rows(sweep)
    }
    for cell in expand(sweep):
        scores, own = read_scores(run.folder(cell)), values[tuple(cell.choices.values())]
        for measure in sweep.measure:
            if (key := measure_key(measure)) in scores:
                for title, value in numbers(measure, scores[key]).items():
                    if value is not None:
                        own[title][cell.seed] = value
    at_base, *_ = values.values()
    table = []
    for choices in rows(sweep):
        own = values[tuple(choices.values())]
        compared = {title: compare(own[title], None if own is at_base else at_base[title]) for title in titles}
        table.append(_row(sweep, choices, compared))
    return Table(titles, sweep.seeds, table)


def compare(values: BySeed, baseline: BySeed | None) -> Number:
    """Mean and spread, and against a baseline the difference of the means over the seeds that both have.

    It is shown where all these seeds of the one lie above all of the other.
    """
    mean = fmean(values.values()) if values else None
    spread = stdev(values.values()) if len(values) > 1 else None
    common = [seed for seed in values if baseline is not None and seed in baseline]
    if baseline is None or not common:
        return Number(values, mean, spread, None, None)
    ours, theirs = [values[seed] for seed in common], [baseline[seed] for seed in common]
    apart = min(ours) > max(theirs) or max(ours) < min(theirs)
    verdict: Verdict = "too few seeds" if len(common) < MIN_SEEDS else "shown" if apart else "not shown"
    return Number(values, mean, spread, fmean(ours) - fmean(theirs), verdict)


def _row(sweep: Sweep, choices: Choices, compared: Mapping[str, Number]) -> Row:
    changed = changes(sweep, choices)
    variants = chosen(sweep, changed)
    published = [
        {**effect.model_dump(), "delta": effect.delta}
        for variant in variants
        if len(variants) == 1  # what two choices do together was not published
        for effect in variant.published
    ]
    notes = [variant.note for variant in variants if variant.note is not None and len(variants) == 1]
    return Row(choices, changed, row_seeds(sweep, choices), compared, published, notes)
