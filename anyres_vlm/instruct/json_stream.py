"""JSON files too large to hold, one value in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

import ijson

from anyres_vlm.data.blobs import open_file
from anyres_vlm.data.sources.record import BOM, parse_json
from anyres_vlm.errors import DataError

FAULTS = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError)  # of entries unlike the others
PACKED = (b"\x1f\x8b", b"PK\x03\x04")  # gzip, zip
SHOWN = 120  # characters of such an entry in a message


def stream_json(path: Path, prefix: str) -> Iterator[Any]:
    """The values at a place of a JSON file, as ijson names it. Raises `DataError` for a missing or malformed file."""
    with _open(path) as stream:
        try:
            yield from ijson.items(stream, prefix, use_float=True)
        except (ijson.JSONError, UnicodeDecodeError) as error:
            raise _malformed(path, error) from None


def stream_members(path: Path) -> Iterator[tuple[str, Any]]:
    """Key and value of one large object. Raises `DataError` for a missing or malformed file."""
    with _open(path) as stream:
        try:
            yield from ijson.kvitems(stream, "", use_float=True)
        except (ijson.JSONError, UnicodeDecodeError) as error:
            raise _malformed(path, error) from None


def stream_records(path: Path) -> Iterator[Any]:
    """The lines of a .jsonl file, or the elements of a JSON list. Raises `DataError` for any other."""
    if path.suffix.lower() != ".jsonl":
        yield from stream_json(path, "item")
        return
    with _open(path) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                where = f"{path} line {number}"
                yield parse_json(line, lambda position, where=where: f"{where} column {position + 1}")  # type: ignore[misc]


@contextmanager
def entry_of(path: Path, what: str, entry: Any) -> Iterator[None]:
    """Turns what reading a malformed entry raises into a `DataError` that shows the entry."""
    try:
        yield
    except DataError:
        raise
    except FAULTS as error:
        shown = repr(entry)
        shown = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."
        raise DataError(f"{path}: {what} {shown} is not as expected: {type(error).__name__} {error}") from None


def text_of(value: Any) -> str:
    """The value. Raises `TypeError` where it is no text."""
    if not isinstance(value, str):
        raise TypeError(f"expected a text, got {value!r}")
    return value


def _open(path: Path) -> BufferedReader:
    """A file, past its byte order mark. Raises `DataError` for one that is missing or packed."""
    stream = open_file(path, str(path))
    start = stream.peek()
    if start.startswith(PACKED):
        stream.close()
        raise DataError(f"{path}: a packed file, expected JSON: unpack it first")
    stream.seek(len(BOM) if start.startswith(BOM) else 0)
    return stream


def _malformed(path: Path, error: Exception) -> DataError:
    said = error.args[0] if error.args else ""
    text = said.decode(errors="replace") if isinstance(said, bytes) else str(error)
    return DataError(f"{path}: malformed JSON: {' '.join(text.split())[:200]}")
