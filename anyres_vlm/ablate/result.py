"""What was measured of a finished cell, and the numbers of the table in it."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from anyres_vlm.ablate.sweep import Measure
from anyres_vlm.durable import replacing
from anyres_vlm.errors import DataError, UsageError

RESULT_FILE = "result.json"

Scores = dict[str, Any]
"""By the key of a measure what its command printed."""


def measure_key(measure: Measure) -> str:
    """Equal for measures that ask the same; what the table takes of it is no matter."""
    asked = measure.model_dump_json(include={"run", "rendered"})
    return f"{measure.run} {hashlib.sha256(asked.encode()).hexdigest()[:8]}"


def read_scores(cell: Path) -> Scores:
    """What has been measured so far. Raises `DataError` for a broken file."""
    path = cell / RESULT_FILE
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["scores"])
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: expected the scores of a cell ({error}); delete it to measure again") from None


def write_scores(cell: Path, about: dict[str, Any], scores: Scores) -> None:
    """Replace the file as a whole."""
    with replacing(cell / RESULT_FILE) as file:
        file.write(json.dumps({**about, "scores": scores}, indent=1) + "\n")


def numbers(measure: Measure, scores: Any) -> dict[str, float | None]:
    """The table's numbers by title; None where the command had none to give, as an error where nothing was counted.

    Raises `UsageError` for a path that the scores do not have.
    """
    flat = dict(_flatten(scores))
    found: dict[str, float | None] = {}
    for title, paths in measure.numbers.items():
        values = [_look_up(flat, path, measure) for path in ([paths] if isinstance(paths, str) else paths)]
        known = [value for value in values if value is not None]
        found[title] = measure.scale * fmean(known) if len(known) == len(values) else None
    return found


def _look_up(flat: dict[str, float | None], path: str, measure: Measure) -> float | None:
    if path not in flat:
        near = difflib.get_close_matches(path, flat, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(list(flat)[:8])}"
        raise UsageError(f"measure {measure.run!r}: no number {path} in its scores; {hint}")
    return flat[path]


def _flatten(scores: Any, prefix: str = "") -> Iterator[tuple[str, float | None]]:
    """Numbers and nulls by dotted path."""
    for key, value in scores.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        elif value is None or isinstance(value, (int, float)):
            yield f"{prefix}{key}", value
