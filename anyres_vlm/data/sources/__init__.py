"""Sources of conversations: JSON, Parquet, tar shards and mixtures behind one interface, with random access by row."""

from __future__ import annotations

import logging
from pathlib import Path

from anyres_vlm.data.sources.mixture import MixtureSource, mixture_files
from anyres_vlm.data.sources.open import MIXTURE_SUFFIXES, find_files, open_single
from anyres_vlm.data.sources.record import Source
from anyres_vlm.errors import DataError, check_bad_records
from anyres_vlm.schema import Record

__all__ = ["Source", "open_source", "read_records", "source_files"]

logger = logging.getLogger(__name__)


def open_source(path: Path, images: Path | None = None) -> Source:
    """Open JSON or JSON Lines in LLaVA's layout, Parquet, tar shards, or a YAML mixture of them.

    `images` is the folder of the images that rows name; the default is the folder of the data file. Tar shards do not
    accept one, and mixtures only in LLaVA-NeXT's layout. Raises `DataError` if a file is missing or broken as a whole,
    and `UsageError` for an invalid mixture.
    """
    if path.suffix.lower() in MIXTURE_SUFFIXES:
        return MixtureSource.open(path, images)
    return open_single(path, images)


def source_files(path: Path) -> list[Path]:
    """Return the data files of a source, without the files of its image folder and without opening any of them.

    Raises `DataError` if one is missing.
    """
    return mixture_files(path) if path.suffix.lower() in MIXTURE_SUFFIXES else find_files(path)


def read_records(path: Path, images: Path | None, max_bad_fraction: float) -> list[Record]:
    """Read all good records of a small source into memory, and log the bad ones.

    Images in Parquet files are kept in memory with their records; use `open_source` for large sources. Raises
    `DataError` if the source cannot be read, or if more than `max_bad_fraction` of its records or all of them are bad.
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
        details = "; ".join(faults[:3]) + ("; ..." if len(faults) > 3 else "")
        try:
            check_bad_records(len(faults), len(source), max_bad_fraction, details, "fix or remove them")
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        logger.warning("%s: %d of %d records are bad (%s)", path, len(faults), len(source), details)
    return records
