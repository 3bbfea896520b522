"""JSON lists and JSON Lines with an image folder, in LLaVA's layout.

Rows are found without parsing them: a table of byte offsets is all that stays in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anyres_vlm.data.blobs import open_file, read_slice
from anyres_vlm.data.sources.paths import image_file
from anyres_vlm.data.sources.record import BOM, LONGEST, folder_key, parse_json, place_in_file, to_record
from anyres_vlm.errors import DataError
from anyres_vlm.schema import Record

Bytes = NDArray[np.uint8]
Offsets = NDArray[np.int64]

BLOCK = 64  # rows of a stream read at once
BLOCK_BYTES = 1 << 24  # if they are no longer than this together; else one

UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
WHITE_SPACE = b" \t\r\n"
CHUNK = 1 << 18  # bytes classified at once: fits the cache and bounds memory

QUOTE, ESCAPE, OPENING, CLOSING, COMMA = range(1, 6)
KINDS = np.zeros(256, np.uint8)
for _character, _kind in ((b'"', QUOTE), (b"\\", ESCAPE), (b"[{", OPENING), (b"]}", CLOSING), (b",", COMMA)):
    KINDS[list(_character)] = _kind


@dataclass(frozen=True, eq=False)
class JsonSource:
    """A row is an element of the list or a line of the JSONL file; only their byte offsets stay in memory."""

    path: Path
    images: Path
    offsets: Offsets

    @classmethod
    def open(cls, path: Path, images: Path | None) -> JsonSource:
        """Find the rows. Raises `DataError` for a file that is missing or neither a list nor lines of JSON."""
        return cls(path, images if images is not None else path.parent, scan_rows(path))

    @property
    def name(self) -> str:
        return self.path.stem

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def records(self, start: int, stop: int) -> Iterator[Record | DataError]:
        """Yield one item per row, in order; for a bad row, its `DataError`."""
        while start < stop:
            end = min(start + BLOCK, stop)
            if self.offsets[end] - self.offsets[start] > BLOCK_BYTES:
                end = start + 1
            rows = range(start, end)
            start = end
            try:
                contents = self._read(rows)
            except DataError as error:
                yield from (error for _ in rows)
                continue
            for row, content in zip(rows, contents, strict=True):
                try:
                    yield self._record(row, content)
                except DataError as error:
                    yield error

    def record(self, row: int) -> Record:
        """Return the record of a row, read with one pread. Raises `DataError` for a bad one."""
        (content,) = self._read(range(row, row + 1))
        return self._record(row, content)

    def fingerprint(self) -> str:
        """Return the hash of the file's bytes and the relative path of the image folder; images are not read."""
        with open_file(self.path, str(self.path)) as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        return hashlib.sha256(f"llava {content} {folder_key(self.images, self.path)}".encode()).hexdigest()

    def _read(self, rows: range) -> list[bytes]:
        bounds = [int(offset) for offset in self.offsets[rows.start : rows.stop + 1]]
        name = f"{self.path} record {rows.start + 1}"
        content = memoryview(read_slice(self.path, bounds[0], bounds[-1] - 1 - bounds[0], name))
        return [bytes(content[start - bounds[0] : end - 1 - bounds[0]]) for start, end in pairwise(bounds)]

    def _record(self, row: int, content: bytes) -> Record:
        entry = parse_json(content, lambda position: place_in_file(self.path, int(self.offsets[row]) + position))
        return to_record(entry, str(row + 1), lambda item, name: image_file(item, name, self.images))


def scan_rows(path: Path) -> Offsets:
    """Find the rows: row i lies in the bytes from `offsets[i]` to `offsets[i + 1] - 1`. Offsets (n + 1,).

    The byte after each row is its separator. A list has one row per element, JSON Lines have one row per line that is
    not blank. The content decides between the two formats, and the suffix if the content fits both. The rows are not
    parsed here. Raises `DataError` for a file that cannot be read, is in neither format, or has content after its list.
    """
    with open_file(path, str(path)) as stream:
        if not stream.seek(0, os.SEEK_END):
            raise DataError(f"{path}: the file is empty, it contains no records")
        data = np.asarray(np.memmap(stream, np.uint8, mode="r"))
    if data[:2].tobytes() in UTF16_BOMS:
        raise DataError(f"{path}: the file is UTF-16: save it as UTF-8")
    start = len(BOM) if data[: len(BOM)].tobytes() == BOM else 0
    opening = _skip_white_space(data, start)
    if _is_lines(data, opening, path.suffix.lower() == ".jsonl"):
        _require_whole_lines(data, opening, path)
        return _lines(data, start)
    return _elements(data, start, path)


def _is_lines(data: Bytes, opening: int, is_named_so: bool) -> bool:
    """Return whether rows are lines: in a `.jsonl` file unless it is a list, or if the first two lines are objects."""
    first, _, rest = _start_of(data, opening).partition(b"\n")
    rest = rest.lstrip(WHITE_SPACE)
    if is_named_so and not first.startswith(b"["):
        return True
    follows = bool(rest) if is_named_so else first.startswith(b"{") and rest.startswith(b"{")
    return follows and _first_value(first) is not None


def _require_whole_lines(data: Bytes, opening: int, path: Path) -> None:
    """Raise `DataError` if the first object spans several lines, each of which would be a broken row."""
    start = _start_of(data, opening)
    first, separator, _ = start.partition(b"\n")
    if separator and first.startswith(b"{") and _first_value(first) is None and _first_value(start) is not None:
        raise DataError(
            f"{place_in_file(path, opening)}: an object over several lines: a .jsonl file has one object a line; "
            f"rewrite it with {_jq('-c', path)}"
        )


def _start_of(data: Bytes, opening: int) -> bytes:
    return data[opening : opening + LONGEST].tobytes()


def _first_value(content: bytes) -> int | None:
    """Return the length in characters of the JSON value at the start of the content, or None if there is none."""
    try:
        return json.JSONDecoder().raw_decode(content.decode("utf-8", errors="replace"))[1]
    except (ValueError, RecursionError):
        return None


def _lines(data: Bytes, start: int) -> Offsets:
    """Return the offsets of the lines that are not blank."""
    breaks = [np.flatnonzero(data[at : at + CHUNK] == ord("\n")) + at for at in range(0, len(data), CHUNK)]
    ends = np.concatenate(breaks)
    starts = np.concatenate([[start], ends + 1])
    starts = starts[starts < len(data)]
    ends = np.append(ends, len(data))
    keep = np.ones(len(starts), bool)
    for index in np.flatnonzero(np.isin(data[starts], list(WHITE_SPACE))):
        keep[index] = bool(data[starts[index] : ends[index]].tobytes().strip(WHITE_SPACE))
    # A blank line belongs to the row before it, whose parser takes white space as well.
    return np.append(starts[keep], len(data) + 1) if keep.any() else np.zeros(1, np.int64)


def _elements(data: Bytes, start: int, path: Path) -> Offsets:
    """Return the offsets of the elements of a list, which are separated by the commas at depth 1."""
    opening = _skip_white_space(data, start)
    if opening == len(data):
        raise DataError(f"{path}: the file is empty, it contains no records")
    if data[opening] != ord("["):
        found = data[opening : opening + 20].tobytes().decode("utf-8", errors="replace")
        if found.startswith("{"):
            _refuse_object(data, opening, path)
        raise DataError(f"{path}: expected a list of records, got {found!r}")
    separators, closing = _separators(data, opening)
    bounds = np.concatenate([[opening], separators])
    last = int(bounds[-1]) + 1
    rest = len(data) if closing is None else _skip_white_space(data, closing + (data[closing] == ord("]")))
    if closing is None or rest != len(data):
        # The fault is usually in the last row, where the parser reports its exact position.
        parse_json(data[last:closing].tobytes(), lambda position: place_in_file(path, last + position))
        if closing is None:
            raise DataError(f"{path}: the list does not end: the file was cut short, or a bracket is missing")
        raise DataError(f"{place_in_file(path, rest)}: malformed JSON: Extra data")
    if len(separators) == 0 and _skip_white_space(data[:closing], opening + 1) == closing:
        return np.zeros(1, np.int64)
    return np.append(bounds, closing) + 1


def _refuse_object(data: Bytes, opening: int, path: Path) -> None:
    """Raise `DataError` for a file that begins with an object."""
    start = _start_of(data, opening)
    length = _first_value(start)
    rest = "" if length is None else start.decode("utf-8", errors="replace")[length:].lstrip()
    if rest.startswith("{"):
        raise DataError(
            f"{path}: several objects one after another: put them into a list ({_jq('-s', path)}) or write one a line "
            f"({_jq('-c', path)})"
        )
    raise DataError(f"{path}: expected a list of records, got dict: put the record into a list")


def _jq(option: str, path: Path) -> str:
    return f"`jq {option} . {path.name}`"


def _separators(data: Bytes, opening: int) -> tuple[Offsets, int | None]:
    """Return the positions of the commas at depth 1, and of the closing bracket (None if there is none)."""
    found: list[Offsets] = []
    depth, quoted, at = 0, 0, opening
    while at < len(data):
        end = min(at + CHUNK, len(data))
        while end < len(data) and data[end - 1] == ord("\\"):
            end += 1  # do not split a run of backslashes
        kinds = KINDS.take(data[at:end])
        places = np.flatnonzero(kinds != 0)  # of booleans: four times as fast
        kinds = kinds[places]
        live = ~_escaped(places, kinds)
        places, kinds = places[live], kinds[live]
        inside = (np.cumsum(kinds == QUOTE) + quoted) & 1
        quoted = int(inside[-1]) if len(inside) else quoted
        structure = (inside == 0) & (kinds >= OPENING)
        places, kinds = places[structure], kinds[structure]
        depths = depth + np.cumsum((kinds == OPENING).astype(np.int64) - (kinds == CLOSING))
        closed = np.flatnonzero(depths == 0)
        if len(closed):
            places, kinds, depths = places[: closed[0] + 1], kinds[: closed[0] + 1], depths[: closed[0] + 1]
        found.append(places[(kinds == COMMA) & (depths == 1)] + at)
        if len(closed):
            return np.concatenate(found), int(places[-1]) + at
        depth = int(depths[-1]) if len(depths) else depth
        at = end
    return np.concatenate(found), None


def _escaped(places: Offsets, kinds: Bytes) -> NDArray[np.bool_]:
    """Return a mask of what to skip: backslashes, and quotes after an odd number of them. (n,) for one chunk."""
    skipped: NDArray[np.bool_] = kinds == ESCAPE
    runs = np.flatnonzero(skipped)
    if len(runs) == 0:
        return skipped
    first = np.ones(len(runs), bool)  # begins a run of backslashes
    first[1:] = np.diff(places[runs]) > 1
    run_starts = places[runs][np.maximum.accumulate(np.where(first, np.arange(len(runs)), 0))]
    following = runs + 1
    inner = following < len(places)
    quotes, lengths = following[inner], (places[runs] - run_starts + 1)[inner]
    hit = (kinds[quotes] == QUOTE) & (places[quotes] == places[runs[inner]] + 1) & (lengths % 2 == 1)
    skipped[quotes[hit]] = True
    return skipped


def _skip_white_space(data: Bytes, start: int) -> int:
    for at in range(start, len(data), CHUNK):
        solid = np.flatnonzero(~np.isin(data[at : at + CHUNK], list(WHITE_SPACE)))
        if len(solid):
            return int(solid[0]) + at
    return len(data)
