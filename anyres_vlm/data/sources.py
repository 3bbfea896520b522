"""LLaVA JSON and JSONL with an image folder, checked record by record."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyres_vlm.errors import DataError
from anyres_vlm.schema import IMAGE_TOKEN, Record, Role, Turn

logger = logging.getLogger(__name__)

ROLES: dict[str, Role] = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


@dataclass(frozen=True, slots=True)
class Reject:
    """A record that is left out, and why."""

    id: str
    reason: str


def read_records(path: Path, images: Path | None, max_bad_fraction: float) -> list[Record]:
    """All good records of a file. Bad ones are counted and listed in the log, up to `max_bad_fraction` of all.

    Raises `DataError` for an unreadable file, and when too many records are bad.
    """
    records: list[Record] = []
    rejects: list[Reject] = []
    for number, entry in _entries(path):
        try:
            records.append(_record(entry, number, images if images is not None else path.parent))
        except DataError as error:
            rejects.append(Reject(str(number), str(error)))
    if not records and not rejects:
        raise DataError(f"{path}: contains no records")
    report_rejects(str(path), rejects, len(records) + len(rejects), max_bad_fraction)
    return records


def report_rejects(source: str, rejects: Sequence[Reject], total: int, max_bad_fraction: float) -> None:
    """Log what is left out. Raises `DataError` when it is more than the allowed share."""
    if not rejects:
        return
    shown = "; ".join(reject.reason for reject in rejects[:3])
    count = f"{len(rejects)} of {total} records are bad ({shown}{'; ...' if len(rejects) > 3 else ''})"
    if len(rejects) > max_bad_fraction * total:
        raise DataError(f"{source}: {count}: mend them or raise max_bad_fraction above {max_bad_fraction:g}")
    logger.warning("%s: %s", source, count)


def _entries(path: Path) -> Iterator[tuple[int, Any]]:
    """(number from 1, parsed entry) of a JSON list, or of a JSONL file by line."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; expected LLaVA JSON or JSONL") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                yield number, _parse(line, path, first_line=number)
        return
    content = _parse(text, path, first_line=1)
    if not isinstance(content, list):
        raise DataError(f"{path}: expected a list of records, got {type(content).__name__}; JSONL files end in .jsonl")
    yield from enumerate(content, start=1)


def _parse(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(f"{path} line {line} column {error.colno}: malformed JSON: {error.msg}") from None


def _record(entry: Any, number: int, images: Path) -> Record:
    if not isinstance(entry, dict):
        raise DataError(f"record {number}: expected an object, got {type(entry).__name__}")
    name = str(entry.get("id", number))
    turns = _turns(entry, name)
    paths = _images(entry, name, images)
    placeholders = sum(turn.text.count(IMAGE_TOKEN) for turn in turns if turn.role == "user")
    if placeholders != len(paths):
        raise DataError(f"record {name}: {placeholders} {IMAGE_TOKEN} in the text, but {len(paths)} images")
    return Record(name, paths, turns, str(entry.get("task", "")))


def _turns(entry: dict[str, Any], name: str) -> tuple[Turn, ...]:
    """`conversations` with from/value or `messages` with role/content: user first, alternating, assistant last."""
    key, role_key, text_key = ("conversations", "from", "value")
    if "messages" in entry:
        key, role_key, text_key = ("messages", "role", "content")
    spoken = entry.get(key)
    if not isinstance(spoken, list) or not spoken:
        raise DataError(f"record {name}: expected a non-empty list under 'conversations' or 'messages'")
    turns: list[Turn] = []
    for position, said in enumerate(spoken, start=1):
        if not isinstance(said, dict) or not isinstance(said.get(text_key), str):
            raise DataError(f"record {name} turn {position}: expected text under {text_key!r}")
        role = ROLES.get(str(said.get(role_key)))
        wanted: Role = "user" if position % 2 else "assistant"
        if role != wanted:
            raise DataError(f"record {name} turn {position}: expected the {wanted}, got {said.get(role_key)!r}")
        if not said[text_key].strip():
            raise DataError(f"record {name} turn {position}: the text is empty")
        turns.append(Turn(role, said[text_key].strip()))
    if turns[-1].role != "assistant":
        raise DataError(f"record {name}: the last turn is the user's, nothing answers it")
    return tuple(turns)


def _images(entry: dict[str, Any], name: str, images: Path) -> tuple[Path, ...]:
    """`image` or `images`, a name or a list of names, inside the image folder."""
    named = entry.get("image", entry.get("images"))
    names = [] if named is None else named if isinstance(named, list) else [named]
    paths = []
    for item in names:
        if not isinstance(item, str) or not item:
            raise DataError(f"record {name}: an image must be a file name, got {item!r}")
        if Path(item).is_absolute() or ".." in Path(item).parts:
            raise DataError(f"record {name}: image {item!r} lies outside the image folder")
        paths.append(images / item)
    return tuple(paths)
