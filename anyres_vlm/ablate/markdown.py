"""The table of a sweep as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from math import comb

from anyres_vlm.ablate.table import MIN_SEEDS, Number, Row, Table

LEGEND = (
    "Mean ± standard deviation over seeds {seeds}; in brackets the difference from the baseline. *Not shown*: at this "
    "scale the effect does not stand out of the spread, for the seeds of the two rows overlap; fewer than {min_seeds} "
    "seeds show nothing. Equal models would not overlap in {chance:.0%} of comparisons. Published are the differences "
    "that the same choice made there, in that benchmark's points."
)


def markdown(table: Table) -> str:
    """The table, what its words mean, where published differences are from, and notes on rows."""
    sources = list(dict.fromkeys(effect["source"] for row in table.rows for effect in row.published))
    head = ["", *table.titles, "published"]
    lines = [_line(head), _line(["---"] * len(head))]
    lines += [_line([_label(row), *_numbers(row, table), _published(row, sources)]) for row in table.rows]
    count = len(table.seeds)
    chance = 2 / comb(2 * count, count)  # of all orders of the seeds of two rows, those with one row's in front
    lines += ["", LEGEND.format(seeds=", ".join(map(str, table.seeds)), min_seeds=MIN_SEEDS, chance=chance)]
    if table.missing:
        lines += ["", f"Not finished: {table.missing} of {sum(len(row.seeds) for row in table.rows)} runs are missing."]
    lines += ["", *(f"- [{number}] {source}" for number, source in enumerate(sources, start=1)), *_notes(table)]
    return "\n".join(lines).rstrip() + "\n"


def label(row: Row) -> str:
    """What a row changes of the baseline."""
    return ", ".join(f"{axis}: {name}" for axis, name in row.changed.items()) or "baseline"


def _label(row: Row) -> str:
    return label(row) if row.changed else f"baseline ({'; '.join(f'{a}: {name}' for a, name in row.choices.items())})"


def _numbers(row: Row, table: Table) -> list[str]:
    return [_number(row.numbers[title], len(table.seeds)) for title in table.titles]


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


def _published(row: Row, sources: list[str]) -> str:
    return ", ".join(
        f"{effect['benchmark']} {effect['delta']:+.4g} [{sources.index(effect['source']) + 1}]"
        for effect in row.published
    )


def _notes(table: Table) -> Iterator[str]:
    yield from (f"- {label(row)}: {note}" for row in table.rows for note in row.notes)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
