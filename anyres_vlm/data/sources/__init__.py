"""Sources of conversations: JSON, Parquet, tar shards and mixtures behind one interface, with random access by row."""

from __future__ import annotations

from pathlib import Path

from anyres_vlm.data.sources.mixture import MixtureSource, mixture_files
from anyres_vlm.data.sources.open import MIXTURE_SUFFIXES, find_files, open_single
from anyres_vlm.data.sources.record import Source
from anyres_vlm.errors import DataError
from anyres_vlm.schema import Record

__all__ = ["Source", "open_source", "read_records", "source_files"]


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


def read_records(path: Path, images: Path | None) -> list[Record]:
    """Read all records of a small source into memory; images in Parquet files are kept with their records.

    Raises `DataError` if the source cannot be read or contains a bad record. Use `open_source` for large sources.
    """
    source = open_source(path, images)
    if len(source) == 0:
        raise DataError(f"{path}: contains no records")
    items = list(source.records(0, len(source)))
    if faults := [str(item) for item in items if isinstance(item, DataError)]:
        details = "; ".join(faults[:3]) + ("; ..." if len(faults) > 3 else "")
        raise DataError(f"{path}: {len(faults):,} of {len(items):,} records are bad ({details}): fix or remove them")
    return [item for item in items if isinstance(item, Record)]
