"""JSON and text from bytes, with errors that say where."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from anyres_vlm.data.blobs import open_file
from anyres_vlm.errors import DataError

BOM = b"\xef\xbb\xbf"
LONGEST = 1 << 20  # bytes of a record: more than any that fits into a sample, and cheap to parse and to tokenise
CHUNK = 1 << 20  # bytes searched at once for line breaks


def parse_json(content: bytes, where: Callable[[int], str]) -> Any:
    """The value. Raises `DataError` with what `where` calls the position of the fault in bytes."""
    if len(content) > LONGEST:
        raise DataError(f"{where(0)}: {len(content):,} bytes of JSON; a record has at most {LONGEST:,}: split it")
    try:
        return json.loads(content.decode("utf-8"))
    except json.JSONDecodeError as error:
        position = len(error.doc[: error.pos].encode())
        raise DataError(f"{where(position)}: malformed JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{where(error.start)}: cannot be read as UTF-8 text: {error.reason}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or brackets as deep
        raise DataError(f"{where(0)}: cannot be parsed as JSON: {error}") from None


def place_in_file(path: Path, position: int) -> str:
    """File, line and column, both from 1, of a byte."""
    breaks, column = 0, b""
    with open_file(path, str(path)) as stream:
        while position and (chunk := stream.read(min(position, CHUNK))):
            position -= len(chunk)
            breaks += chunk.count(b"\n")
            _, found, after = chunk.rpartition(b"\n")
            column = after if found else column + chunk
    return f"{path} line {breaks + 1} column {_length(column) + 1}"


def place_in_text(name: str, content: bytes, position: int) -> str:
    """Name, line and column, both from 1, of a byte."""
    lines = content[:position].split(b"\n")
    return f"{name} line {len(lines)} column {_length(lines[-1]) + 1}"


def _length(column: bytes) -> int:
    return len(column.removeprefix(BOM).decode("utf-8", errors="replace"))
