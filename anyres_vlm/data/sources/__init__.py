"""Where conversations come from: one interface, several kinds, random access by row."""

from __future__ import annotations

from pathlib import Path

from anyres_vlm.data.sources.base import Source
from anyres_vlm.data.sources.llava import LlavaSource
from anyres_vlm.data.sources.rejects import Reject, report_rejects
from anyres_vlm.errors import DataError
from anyres_vlm.schema import Record

__all__ = ["Reject", "Source", "open_source", "read_records", "report_rejects"]


def open_source(path: Path, images: Path | None = None) -> Source:
    """A source of any kind. Raises `DataError` if it is missing or broken as a whole."""
    return LlavaSource.open(path, images)


def read_records(path: Path, images: Path | None, max_bad_fraction: float) -> list[Record]:
    """All good records of a source, in memory. Bad ones are counted and logged, up to `max_bad_fraction` of all.

    Raises `DataError` for an unreadable source, and when too many records are bad.
    """
    source = open_source(path, images)
    if len(source) == 0:
        raise DataError(f"{path}: contains no records")
    records: list[Record] = []
    rejects: list[Reject] = []
    for row, item in enumerate(source.records(0, len(source)), start=1):
        if isinstance(item, DataError):
            rejects.append(Reject(str(row), str(item)))
        else:
            records.append(item)
    report_rejects(str(path), rejects, len(source), max_bad_fraction)
    return records
