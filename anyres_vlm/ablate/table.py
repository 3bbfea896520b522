"""The table of a sweep: means and standard deviations over seeds, and which differences exceed the seeds' spread.

It is written as Markdown and drawn as a chart with a panel for each number, a line for each row, a point for each seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import comb
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from anyres_vlm.ablate.jobs import SweepRun, measure_key, numbers, read_scores
from anyres_vlm.ablate.sweep import Choices, Sweep, changes, combinations, expand, seeds_of, variants_of

MIN_SEEDS = 3  # equal models are apart in 1 of 3 comparisons with two seeds, in 1 of 10 with three
Verdict = Literal["shown", "not shown", "too few seeds"]
BySeed = Mapping[int, float]
LEGEND = (
    "Mean ± standard deviation over seeds {seeds}; the difference from the baseline is in brackets. *Not shown*: the "
    "seeds of the two rows overlap, so the effect does not exceed the spread at this scale. Fewer than {min_seeds} "
    "seeds never show an effect. Without a real effect, the seeds would be apart in {chance:.0%} of comparisons. The "
    "published differences are those of the same choice elsewhere, in points of that benchmark."
)
COLOURS = {"shown": "tab:blue", None: "black"}
NOT_SHOWN_COLOUR = "0.6"  # grey


@dataclass(frozen=True)
class Number:
    """One number of one row. `spread` is the sample standard deviation; `delta` covers the seeds of both rows."""

    by_seed: BySeed
    mean: float | None
    spread: float | None
    delta: float | None
    verdict: Verdict | None


@dataclass(frozen=True)
class Row:
    """One combination of variants. `changed` are the choices that differ from the baseline."""

    choices: Choices
    changed: Choices
    seeds: Sequence[int]
    numbers: Mapping[str, Number]
    published: Sequence[Mapping[str, Any]]
    notes: Sequence[str]

    @property
    def label(self) -> str:
        """What the row changes."""
        return ", ".join(f"{axis}: {name}" for axis, name in self.changed.items()) or "baseline"


@dataclass(frozen=True)
class Table:
    """All rows, the baseline first."""

    titles: Sequence[str]
    seeds: Sequence[int]
    rows: Sequence[Row]

    @property
    def missing(self) -> int:
        """Cells without a result."""
        return sum(len(row.seeds) - max(len(number.by_seed) for number in row.numbers.values()) for row in self.rows)


def make_table(run: SweepRun) -> Table:
    """Return the table of all finished cells."""
    sweep = run.sweep
    titles = [title for measure in sweep.measure for title in measure.numbers]
    values: dict[tuple[str, ...], dict[str, dict[int, float]]] = {
        tuple(choices.values()): {title: {} for title in titles} for choices in combinations(sweep)
    }
    for cell in expand(sweep):
        scores, own = read_scores(run.folder(cell)), values[tuple(cell.choices.values())]
        for measure in sweep.measure:
            if (key := measure_key(measure)) in scores:
                for title, value in numbers(measure, scores[key]).items():
                    if value is not None:
                        own[title][cell.seed] = value
    baseline, *_ = values.values()
    table = []
    for choices in combinations(sweep):
        own = values[tuple(choices.values())]
        compared = {title: compare(own[title], None if own is baseline else baseline[title]) for title in titles}
        table.append(_row(sweep, choices, compared))
    return Table(titles, sweep.seeds, table)


def compare(values: BySeed, baseline: BySeed | None) -> Number:
    """Return mean and spread, and the difference from a baseline over the seeds that both have.

    It is shown if all seeds of one row lie above all seeds of the other.
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
    variants = variants_of(sweep, changed)
    known = variants if len(variants) == 1 else []  # the joint effect of two choices is not published
    published = [{**effect.model_dump(), "delta": effect.delta} for variant in known for effect in variant.published]
    notes = [variant.note for variant in known if variant.note is not None]
    return Row(choices, changed, seeds_of(sweep, choices), compared, published, notes)


def markdown(table: Table) -> str:
    """Return the table as Markdown, with a legend, the sources of published differences, and notes on rows."""
    sources = list(dict.fromkeys(effect["source"] for row in table.rows for effect in row.published))
    head = ["", *table.titles, "published"]
    lines = [_line(head), _line(["---"] * len(head))]
    for row in table.rows:
        label = row.label if row.changed else f"baseline ({'; '.join(f'{a}: {n}' for a, n in row.choices.items())})"
        cells = [_number(row.numbers[title], len(table.seeds)) for title in table.titles]
        published = ", ".join(
            f"{effect['benchmark']} {effect['delta']:+.4g} [{sources.index(effect['source']) + 1}]"
            for effect in row.published
        )
        lines.append(_line([label, *cells, published]))
    count = len(table.seeds)
    chance = 2 / comb(2 * count, count)  # share of the orders of all seeds in which one row's seeds come first
    lines += ["", LEGEND.format(seeds=", ".join(map(str, table.seeds)), min_seeds=MIN_SEEDS, chance=chance)]
    if table.missing:
        lines += ["", f"Not finished: {table.missing} of {sum(len(row.seeds) for row in table.rows)} runs are missing."]
    lines += ["", *(f"- [{number}] {source}" for number, source in enumerate(sources, start=1))]
    lines += [f"- {row.label}: {note}" for row in table.rows for note in row.notes]
    return "\n".join(lines).rstrip() + "\n"


def _number(number: Number, num_seeds: int) -> str:
    if number.mean is None:
        return "-"
    text = f"{number.mean:.1f}" + ("" if number.spread is None else f" ± {number.spread:.1f}")
    remarks = [] if number.delta is None else [f"{number.delta:+.1f}"]
    if len(number.by_seed) < num_seeds:
        remarks.append(f"{len(number.by_seed)} of {num_seeds} seeds")
    elif number.verdict not in (None, "shown"):
        remarks.append(f"*{number.verdict}*")
    return text + (f" ({', '.join(remarks)})" if remarks else "")


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def draw_table(table: Table, path: Path) -> Path | None:
    """Draw each row's seeds and mean, with the baseline's range as a band; None without matplotlib."""
    if find_spec("matplotlib") is None:
        return None
    import matplotlib  # an optional extra

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (3 + 3.2 * len(table.titles), 1.4 + 0.32 * len(table.rows))
    figure, axes = pyplot.subplots(1, len(table.titles), figsize=size, sharey=True, squeeze=False)
    for axis, title in zip(axes[0], table.titles, strict=True):
        by_row = [row.numbers[title] for row in table.rows]
        if base := list(by_row[0].by_seed.values()):
            axis.axvspan(min(base), max(base), color="0.9")
        for place, number in enumerate(by_row):
            colour = COLOURS.get(number.verdict, NOT_SHOWN_COLOUR)
            axis.plot(list(number.by_seed.values()), [place] * len(number.by_seed), ".", color=colour)
            if number.mean is not None:
                axis.plot(number.mean, place, "|", color=colour, markersize=16)
        axis.set(xlabel=title, yticks=range(len(table.rows)), yticklabels=[row.label for row in table.rows])
        axis.grid(axis="x", alpha=0.3)
    axes[0][0].set_ylim(len(table.rows) - 0.5, -0.5)  # the baseline on top
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
