"""What the probes found: headline numbers with intervals, tables, and reading against text height as one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np

from anyres_vlm.errors import DataError
from anyres_vlm.evaluate.probes.case import Reply, yes_or_no
from anyres_vlm.evaluate.probes.counting import number_in
from anyres_vlm.evaluate.probes.picture import draw_probes
from anyres_vlm.evaluate.probes.reading import read
from anyres_vlm.evaluate.probes.run import THUMBNAIL
from anyres_vlm.evaluate.report.bootstrap import Interval, draw, interval, shares
from anyres_vlm.evaluate.report.results import Probes


@dataclass(frozen=True)
class Headline:
    """One number of a probe in percent, over so many pictures; `guess` is what one gets without looking."""

    name: str
    value: float
    interval: Interval | None
    pictures: int
    guess: str


@dataclass(frozen=True)
class Table:
    """A probe's scores by one thing that it varies; a cell is a share, or None."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[float | None]]]


@dataclass(frozen=True)
class Probed:
    """One run's probes, ready to be shown; `figure` is a PNG, None without matplotlib or without those probes."""

    run: Probes
    headlines: list[Headline]
    tables: list[Table]
    figure: bytes | None


def read_probes(run: Probes) -> Probed:
    """Raises `DataError` where the replies are not those of `anyres probe`."""
    try:
        replies = {name: [Reply(**reply) for reply in several] for name, several in run.replies.items()}
        headlines = [line for name in replies if replies[name] for line in _headlines(name, replies)]
        content = BytesIO()
        figure = content.getvalue() if draw_probes(run.scores, content) else None
        return Probed(run, headlines, _tables(run.scores), figure)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        kind = f"{type(error).__name__}: {error}"
        raise DataError(f"{run.label}: not the probes of this version ({kind}): run anyres probe again") from None


def _headlines(name: str, by_probe: Mapping[str, Sequence[Reply]]) -> list[Headline]:
    replies = by_probe[name]
    right = [float(yes_or_no(reply.said) is (reply.answer == "yes")) for reply in replies]
    match name:
        case "hallucination":
            said_yes = [float(yes_or_no(reply.said) is True) - 0.5 for reply in replies]
            return [
                _headline("objects there or not, accuracy", right, 2, "50"),
                _headline("share of yes less the half that is true", said_yes, 2, "0; always yes +50, always no -50"),
            ]
        case "spatial":
            both = [first * second for first, second in zip(right[::2], right[1::2], strict=True)]
            return [
                _headline("relations, accuracy", right, 2, "50"),
                _headline("swap test: right both ways round", both, 1, "25; always the same answer 0"),
            ]
        case "counting":
            hits = [float(number_in(reply.said) == reply.facts["count"]) for reply in replies]
            return [_headline("objects counted right", hits, 1, "8.3")]
        case "reading":
            tiles, alone = _read(replies), _read(by_probe.get(THUMBNAIL, []))
            lines = [_headline(f"{what} read, with tiles", tiles[what], 1, "0") for what in tiles]
            if len(alone["words"]) == len(replies):
                lines += [_headline(f"{what} read, thumbnail alone", alone[what], 1, "0") for what in alone]
                lines += [
                    _headline(f"{what}: tiles less thumbnail alone, same pictures", list(gain), 1, "0 is no gain")
                    for what, gain in ((what, np.subtract(tiles[what], alone[what])) for what in tiles)
                ]
            return lines
    return []


def _read(replies: Sequence[Reply]) -> dict[str, list[float]]:
    shares_read = [read(reply.said, reply.answer) for reply in replies]
    return {"words": [float(share == 1) for share in shares_read], "characters": shares_read}


def _headline(name: str, values: Sequence[float], questions: int, guess: str) -> Headline:
    """`questions` of one picture stand behind each other."""
    ratios = np.array([[value, 1.0] for value in values])[:, None, :]
    drawn = draw(ratios, [str(number // questions) for number in range(len(values))])
    value = float(shares(ratios.sum(axis=0))[0])
    return Headline(name, value, interval(shares(drawn)[:, 0]), len(values) // questions, guess)


def _cell(value: Any) -> float | None:
    return None if value is None else float(value)


def _tables(scores: Mapping[str, Any]) -> list[Table]:
    tables = []
    for probe, by_value in scores.items():
        is_nested = all(isinstance(cell, dict) for row in by_value.values() for cell in row.values())
        factors = {f"{probe}, by {name}": rows for name, rows in by_value.items()} if is_nested else {probe: by_value}
        for title, rows in factors.items():
            columns = list(dict.fromkeys(column for row in rows.values() for column in row))
            cells = [(str(value), [_cell(row.get(column)) for column in columns]) for value, row in rows.items()]
            tables.append(Table(title, [column.replace("_", " ") for column in columns], cells))
    return tables
