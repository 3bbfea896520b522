"""Where the rows of a JSON list or of a JSONL file begin, without parsing them: a table of byte offsets."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anyres_vlm.data.blobs import open_file
from anyres_vlm.data.sources.parsing import BOM, parse_json, place_in_file
from anyres_vlm.errors import DataError

Bytes = NDArray[np.uint8]
Offsets = NDArray[np.int64]

WHITE_SPACE = b" \t\r\n"
CHUNK = 1 << 18  # bytes classified at once: fits the cache and bounds memory

QUOTE, ESCAPE, OPENING, CLOSING, COMMA = range(1, 6)
KINDS = np.zeros(256, np.uint8)
for _character, _kind in ((b'"', QUOTE), (b"\\", ESCAPE), (b"[{", OPENING), (b"]}", CLOSING), (b",", COMMA)):
    KINDS[list(_character)] = _kind


def scan_rows(path: Path) -> Offsets:
    """Offsets (n + 1,): row i lies in the bytes from `offsets[i]` to `offsets[i + 1] - 1`.

    The last byte of each range is what separates it from the next row. A file ending in `.jsonl` has a row a line,
    blank ones apart; any other is a list. What lies between separators is left for the parser to judge.
    Raises `DataError` for a file that cannot be read, is no list, or does not end where the list does.
    """
    with open_file(path, str(path)) as stream:
        if not stream.seek(0, os.SEEK_END):
            raise DataError(f"{path}: the file is empty, it contains no records")
        data = np.asarray(np.memmap(stream, np.uint8, mode="r"))
    start = len(BOM) if data[: len(BOM)].tobytes() == BOM else 0
    return _lines(data, start) if path.suffix.lower() == ".jsonl" else _elements(data, start, path)


def _lines(data: Bytes, start: int) -> Offsets:
    """Lines that are not blank."""
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
    """Elements of a list: what lies between the commas at depth 1."""
    opening = _skip_white_space(data, start)
    if opening == len(data):
        raise DataError(f"{path}: the file is empty, it contains no records")
    if data[opening] != ord("["):
        found = data[opening : opening + 20].tobytes().decode("utf-8", errors="replace")
        kind = "dict" if found.startswith("{") else repr(found)
        raise DataError(f"{path}: expected a list of records, got {kind}; JSONL files end in .jsonl")
    separators, closing = _separators(data, opening)
    bounds = np.concatenate([[opening], separators])
    last = int(bounds[-1]) + 1
    rest = len(data) if closing is None else _skip_white_space(data, closing + (data[closing] == ord("]")))
    if closing is None or rest != len(data):
        # The fault is in the last row, as a rule, and its parser knows better where.
        parse_json(data[last:closing].tobytes(), lambda position: place_in_file(path, last + position))
        if closing is None:
            raise DataError(f"{path}: the list does not end: the file was cut short, or a bracket is missing")
        raise DataError(f"{place_in_file(path, rest)}: malformed JSON: Extra data")
    if len(separators) == 0 and _skip_white_space(data[:closing], opening + 1) == closing:
        return np.zeros(1, np.int64)
    return np.append(bounds, closing) + 1


def _separators(data: Bytes, opening: int) -> tuple[Offsets, int | None]:
    """Commas at depth 1 behind the opening bracket, and where that bracket closes."""
    found: list[Offsets] = []
    depth, quoted, at = 0, 0, opening
    while at < len(data):
        end = min(at + CHUNK, len(data))
        while end < len(data) and data[end - 1] == ord("\\"):
            end += 1  # a run of backslashes is judged as a whole
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
    """What a scan skips: backslashes, and quotes behind an odd run of them. Both (n,), of one chunk."""
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
