"""Find the files of a source, open it by its kind, and sample a few of its records."""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from anyres_vlm.data.blobs import is_sidecar
from anyres_vlm.data.headers import read_size
from anyres_vlm.data.sources.json import JsonSource
from anyres_vlm.data.sources.parquet import ParquetSource
from anyres_vlm.data.sources.record import Source
from anyres_vlm.data.sources.webdataset import WebDatasetSource
from anyres_vlm.errors import DataError

logger = logging.getLogger(__name__)

PEEKED = 32  # records read by `peek`
MIXTURE_SUFFIXES = (".yaml", ".yml")
EXPECTED = ".json or .jsonl, .parquet or .tar files (a folder or pattern of them), or a .yaml mixture"
COMPRESSED_TAR = re.compile(r"\.(tgz|tbz2?|txz|tar\.\w+)$", re.IGNORECASE)
SHARD = re.compile(rf"\.(parquet|tar)$|{COMPRESSED_TAR.pattern}", re.IGNORECASE)
BRACES = re.compile(r"\{(?:(?P<first>\d+)\.\.(?P<last>\d+)|(?P<choices>[^{}]*,[^{}]*))\}")


def open_single(path: Path, images: Path | None) -> Source:
    """Open a source other than a mixture: a file, or a folder or pattern (`*`, `{00..15}`) of Parquet or tar files.

    Raises `DataError` if it is missing, of an unknown kind or broken as a whole.
    """
    files = find_files(path)
    suffixes = {file.suffix.lower() for file in files}
    if any(COMPRESSED_TAR.search(file.name) for file in files):
        raise DataError(f"{path}: a compressed tar has no random access: unpack it to a plain .tar")
    if suffixes == {".parquet"}:
        return ParquetSource(files, images)
    if suffixes == {".tar"}:
        if images is not None:
            raise DataError(f"{path}: tar shards hold their images: leave the image folder {images} out")
        return WebDatasetSource(files)
    if len(files) == 1 and suffixes <= {".json", ".jsonl"}:
        return JsonSource.open(files[0], images)
    if suffixes & set(MIXTURE_SUFFIXES):
        raise DataError(f"{path}: a mixture inside a mixture: list its sources themselves")
    raise DataError(f"{path}: expected {EXPECTED}, got {', '.join(file.name for file in files[:3])}")


def find_files(path: Path) -> list[Path]:
    """Return the files that a path stands for: itself, those of a folder, or the matches of a pattern; sorted.

    Metadata files of macOS and Windows are left out. Raises `DataError` if there is no file.
    """
    if path.is_dir():
        found = sorted(_without_sidecars((file for file in path.iterdir() if SHARD.search(file.name)), path))
        if not found:
            raise DataError(f"{path}: no .parquet or .tar files directly in this folder; expected {EXPECTED}")
        return found
    if path.exists():
        return [path]
    files = []
    for pattern in _expand_braces(str(path)):
        if glob.has_magic(pattern):
            files += sorted(_without_sidecars(map(Path, glob.glob(pattern, recursive=True)), path))
        else:
            files.append(Path(pattern))
    missing = next((file for file in files if not file.exists()), path if not files else None)
    if missing is not None:
        raise DataError(f"{missing}: no such file; expected {EXPECTED}")
    return files


def _without_sidecars(files: Iterable[Path], path: Path) -> list[Path]:
    listed = list(files)
    kept = [file for file in listed if not is_sidecar(str(file))]
    if len(kept) < len(listed):
        logger.info("%s: %d files of macOS or Windows (._*, .DS_Store, ...) are skipped", path, len(listed) - len(kept))
    return kept


def _expand_braces(pattern: str) -> list[str]:
    """Expand `a{08..10}` to a08, a09, a10 and `{x,y}` to x, y; the first number's leading zeros set the width."""
    found = BRACES.search(pattern)
    if found is None:
        return [pattern]
    if found["choices"] is not None:
        choices = found["choices"].split(",")
    else:
        numbers = range(int(found["first"]), int(found["last"]) + 1)
        choices = [str(number).zfill(len(found["first"])) for number in numbers]
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [expanded for choice in choices for expanded in _expand_braces(before + choice + after)]


@dataclass(frozen=True)
class Peek:
    """A sample of the records: how many were read, how many of them have images, and the errors of bad ones."""

    looked: int
    with_images: int
    bad: tuple[str, ...]


def peek(source: Source) -> Peek:
    """Read up to `PEEKED` evenly spaced records, and the headers of their images."""
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
