"""Results of the probes: headline numbers with intervals, tables, and a chart of reading and counting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from anyres_vlm.errors import DataError
from anyres_vlm.evaluate.probes.cases import THUMBNAIL, Reply, number_in, read, yes_or_no
from anyres_vlm.evaluate.report.results import Probes
from anyres_vlm.evaluate.report.statistics import draw, interval, shares


def read_probes(run: Probes) -> dict[str, Any]:
    """Return what the templates show of a run: headlines, tables, and a chart as PNG or None.

    Raises `DataError` if the replies are not those of `anyres probe`.
    """
    try:
        replies = {name: [Reply(**reply) for reply in several] for name, several in run.replies.items()}
        headlines = [line for name in replies if replies[name] for line in _headlines(name, replies)]
        content = BytesIO()
        figure = content.getvalue() if draw_probes(run.scores, content) else None
        return {"run": run, "headlines": headlines, "tables": _tables(run.scores), "figure": figure}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        kind = f"{type(error).__name__}: {error}"
        raise DataError(f"{run.label}: not a file of this version's anyres probe ({kind}): run it again") from None


def _headlines(name: str, by_probe: Mapping[str, Sequence[Reply]]) -> list[dict[str, Any]]:
    replies = by_probe[name]
    right = [float(yes_or_no(reply.said) is (reply.answer == "yes")) for reply in replies]
    match name:
        case "hallucination":
            said_yes = [float(yes_or_no(reply.said) is True) - 0.5 for reply in replies]
            return [
                _headline("object present or absent, accuracy", right, 2, "50"),
                _headline("share of yes minus the true share of 50", said_yes, 2, "0; always yes +50, always no -50"),
            ]
        case "spatial":
            both = [first * second for first, second in zip(right[::2], right[1::2], strict=True)]
            return [
                _headline("relations, accuracy", right, 2, "50"),
                _headline("swap test: both orders correct", both, 1, "25; 0 for a constant answer"),
            ]
        case "counting":
            hits = [float(number_in(reply.said) == reply.facts["count"]) for reply in replies]
            return [_headline("objects counted correctly", hits, 1, "8.3")]
        case "reading":
            tiles, alone = _read_shares(replies), _read_shares(by_probe.get(THUMBNAIL, []))
            lines = [_headline(f"{what} read, with tiles", tiles[what], 1, "0") for what in tiles]
            if len(alone["words"]) == len(replies):
                lines += [_headline(f"{what} read, thumbnail only", alone[what], 1, "0") for what in alone]
                lines += [
                    _headline(f"{what}: tiles minus thumbnail only, same images", list(gain), 1, "0 (no gain)")
                    for what, gain in ((what, np.subtract(tiles[what], alone[what])) for what in tiles)
                ]
            return lines
    return []


def _read_shares(replies: Sequence[Reply]) -> dict[str, list[float]]:
    shares_read = [read(reply.said, reply.answer) for reply in replies]
    return {"words": [float(share == 1) for share in shares_read], "characters": shares_read}


def _headline(name: str, values: Sequence[float], questions: int, guess: str) -> dict[str, Any]:
    """Return a mean in percent with its interval, and what a blind model gets.

    `questions` consecutive values belong to one image.
    """
    ratios = np.array([[value, 1.0] for value in values])[:, None, :]
    drawn = draw(ratios, [str(number // questions) for number in range(len(values))])
    return {
        "name": name,
        "value": float(shares(ratios.sum(axis=0))[0]),
        "interval": interval(shares(drawn)[:, 0]),
        "images": len(values) // questions,
        "guess": guess,
    }


def _tables(scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a table for each probe, for reading one for each factor; a cell is a share or None."""
    tables = []
    for probe, by_value in scores.items():
        is_nested = all(isinstance(cell, dict) for row in by_value.values() for cell in row.values())
        factors = {f"{probe}, by {name}": rows for name, rows in by_value.items()} if is_nested else {probe: by_value}
        for title, rows in factors.items():
            columns = list(dict.fromkeys(column for row in rows.values() for column in row))
            cells = [(str(value), [_number(row.get(column)) for column in columns]) for value, row in rows.items()]
            tables.append({"title": title, "columns": [name.replace("_", " ") for name in columns], "rows": cells})
    return tables


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def draw_probes(scores: Mapping[str, Any], file: Path | BinaryIO) -> bool:
    """Draw reading by text height and counting by true count; return False without matplotlib or these probes."""
    if find_spec("matplotlib") is None or not {"reading", "counting"} & scores.keys():
        return False
    import matplotlib  # an optional extra

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (reading, counting) = pyplot.subplots(1, 2, figsize=(12, 4))
    for name, label, colour in (("reading", "AnyRes", "tab:blue"), (THUMBNAIL, "thumbnail only", "tab:orange")):
        for factor, measure, title, style in (
            ("known height", "words", "known words", "--"),
            ("height", "words", "new words", "-"),
            ("height", "characters", "characters of new words", ":"),
        ):
            if rows := scores.get(name, {}).get(factor):
                heights, shares = [int(height) for height in rows], [row[measure] for row in rows.values()]
                reading.plot(heights, shares, style, marker="o", color=colour, label=f"{label}, {title}")
    reading.set(xlabel="height of a capital in the image (pixels)", ylabel="share read", ylim=(0, 1))
    by_count = {int(true): row for true, row in scores.get("counting", {}).items() if true != "all"}
    counting.bar(list(by_count), [row["accuracy"] for row in by_count.values()], color="tab:blue")
    counting.set(xlabel="objects in the image", ylabel="share counted correctly", ylim=(0, 1))
    for axis in (reading, counting):
        axis.grid(alpha=0.3)
    if reading.lines:
        reading.legend()
    figure.tight_layout()
    figure.savefig(file, format="png", dpi=110)
    pyplot.close(figure)
    return True
