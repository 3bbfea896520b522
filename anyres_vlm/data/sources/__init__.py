"""Where conversations come from: one interface, several kinds, random access by row."""

from __future__ import annotations

from pathlib import Path

from anyres_vlm.data.sources.base import Source
from anyres_vlm.data.sources.kinds import MIXTURE_SUFFIXES, find_files, open_single
from anyres_vlm.data.sources.mixture import MixtureSource, mixture_files
from anyres_vlm.data.sources.rejects import Reject, report_rejects
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.schema import Record

__all__ = ["Reject", "Source", "open_source", "read_records", "report_rejects", "source_files"]


def open_source(path: Path, images: Path | None = None) -> Source:
    """LLaVA JSON or JSONL, Parquet, tar shards, or a YAML mixture of them.

    `images` is the folder of images that the rows name, by default that of the data file; it is not for mixtures and
    tar shards. Raises `DataError` if something is missing or broken as a whole, `UsageError` for a wrong mixture.
    """
    if path.suffix.lower() not in MIXTURE_SUFFIXES:
        return open_single(path, images)
    if images is not None:
        raise UsageError(f"{path}: a mixture names the image folder of each source itself: leave {images} out")
    return MixtureSource.open(path)


def source_files(path: Path) -> list[Path]:
    """The data files of a source, without opening them; images in an image folder are not among them.

    Raises `DataError` if one is missing.
    """
    return mixture_files(path) if path.suffix.lower() in MIXTURE_SUFFIXES else find_files(path)


def read_records(path: Path, images: Path | None, max_bad_fraction: float) -> list[Record]:
    """All good records of a source, in memory. Bad ones are counted and logged, up to `max_bad_fraction` of all.

    Images that lie in Parquet files stay in memory with their records; large sources are for `open_source`.
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
