"""Where conversations come from: one interface, several kinds, random access by row."""

from __future__ import annotations

import logging
from pathlib import Path

from anyres_vlm.data.sources.mixture import MixtureSource, mixture_files
from anyres_vlm.data.sources.open import MIXTURE_SUFFIXES, find_files, open_single
from anyres_vlm.data.sources.record import Source
from anyres_vlm.errors import DataError
from anyres_vlm.schema import Record

__all__ = ["Source", "open_source", "read_records", "source_files"]

logger = logging.getLogger(__name__)


def open_source(path: Path, images: Path | None = None) -> Source:
    """Open LLaVA JSON or JSON Lines, Parquet, tar shards, or a YAML mixture of them.

    `images` is the folder of images that the rows name, by default that of the data file. Tar shards take none, and of
    mixtures only those in LLaVA's own layout. Raises `DataError` if something is missing or broken as a whole,
    `UsageError` for a wrong mixture.
    """
    if path.suffix.lower() in MIXTURE_SUFFIXES:
        return MixtureSource.open(path, images)
    return open_single(path, images)


def source_files(path: Path) -> list[Path]:
    """Return the data files of a source, without opening them; images in an image folder are not among them.

    Raises `DataError` if one is missing.
    """
    return mixture_files(path) if path.suffix.lower() in MIXTURE_SUFFIXES else find_files(path)


def read_records(path: Path, images: Path | None, max_bad_fraction: float) -> list[Record]:
    """Read all good records of a source into memory. Bad ones are counted and logged, up to `max_bad_fraction` of all.

    Images that lie in Parquet files stay in memory with their records; large sources are for `open_source`.
    Raises `DataError` for an unreadable source, and when too many records are bad.
    """
    source = open_source(path, images)
    if len(source) == 0:
        raise DataError(f"{path}: contains no records")
    records: list[Record] = []
    faults: list[str] = []
    for item in source.records(0, len(source)):
        if isinstance(item, DataError):
            faults.append(str(item))
        else:
            records.append(item)
    if faults:
        _report(path, faults, len(source), max_bad_fraction)
    return records


def _report(path: Path, faults: list[str], total: int, max_bad_fraction: float) -> None:
    """Log what is left out. Raises `DataError` when it is more than the allowed share, or everything."""
    shown = "; ".join(faults[:3])
    count = f"{len(faults)} of {total} records are bad ({shown}{'; ...' if len(faults) > 3 else ''})"
    if len(faults) > max_bad_fraction * total:
        raise DataError(f"{path}: {count}: correct them or raise max_bad_fraction above {max_bad_fraction:g}")
    if len(faults) == total:
        raise DataError(f"{path}: {count}: no good record is left")
    logger.warning("%s: %s", path, count)
