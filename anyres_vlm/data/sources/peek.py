"""A look at a source: some records and the headers of their images, from the first to the last."""

from __future__ import annotations

from dataclasses import dataclass

from anyres_vlm.data.headers import read_size
from anyres_vlm.data.sources.base import Source
from anyres_vlm.errors import DataError

PEEKED = 32


@dataclass(frozen=True)
class Peek:
    """What some records are like: how many were looked at, how many of them have images, and what is wrong."""

    looked: int
    with_images: int
    bad: tuple[str, ...]


def peek(source: Source) -> Peek:
    """Read up to `PEEKED` records, evenly spread."""
    last = len(source) - 1
    rows = sorted({row * last // (PEEKED - 1) for row in range(PEEKED)}) if last >= 0 else []
    with_images, bad = 0, []
    for row in rows:
        try:
            record = source.record(row)
            with_images += bool(record.images)
            for image in record.images:
                read_size(image)
        except DataError as error:
            bad.append(str(error))
    return Peek(len(rows), with_images, tuple(bad))
