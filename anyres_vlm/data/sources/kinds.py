"""Which kind of source a path names."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from anyres_vlm.data.sources.base import Source
from anyres_vlm.data.sources.llava import LlavaSource
from anyres_vlm.data.sources.parquet import ParquetSource
from anyres_vlm.data.sources.webdataset import WebDatasetSource
from anyres_vlm.errors import DataError

MIXTURE_SUFFIXES = (".yaml", ".yml")
EXPECTED = ".json or .jsonl, .parquet or .tar files (a folder or pattern of them), or a .yaml mixture"
COMPRESSED_TAR = re.compile(r"\.(tgz|tbz2?|txz|tar\.\w+)$", re.IGNORECASE)
SHARD = re.compile(rf"\.(parquet|tar)$|{COMPRESSED_TAR.pattern}", re.IGNORECASE)
BRACES = re.compile(r"\{(?:(?P<first>\d+)\.\.(?P<last>\d+)|(?P<choices>[^{}]*,[^{}]*))\}")


def open_single(path: Path, images: Path | None) -> Source:
    """A source that is no mixture: a file, a folder of Parquet or tar files, or a pattern of them (`*`, `{00..15}`).

    Raises `DataError` if it is missing, of no known kind or broken as a whole.
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
        return LlavaSource.open(files[0], images)
    if suffixes & set(MIXTURE_SUFFIXES):
        raise DataError(f"{path}: a mixture inside a mixture: list its sources themselves")
    raise DataError(f"{path}: expected {EXPECTED}, got {', '.join(file.name for file in files[:3])}")


def find_files(path: Path) -> list[Path]:
    """The files that a path stands for: itself, those of a folder, or the matches of a pattern; sorted.

    Raises `DataError` if there is none.
    """
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if SHARD.search(file.name))
        if not found:
            raise DataError(f"{path}: no .parquet or .tar files directly in this folder; expected {EXPECTED}")
        return found
    if path.exists():
        return [path]
    files = []
    for pattern in _expand_braces(str(path)):
        if glob.has_magic(pattern):
            files += sorted(Path(match) for match in glob.glob(pattern, recursive=True))
        else:
            files.append(Path(pattern))
    missing = next((file for file in files if not file.exists()), path if not files else None)
    if missing is not None:
        raise DataError(f"{missing}: no such file; expected {EXPECTED}")
    return files


def _expand_braces(pattern: str) -> list[str]:
    """`a{08..10}` to a08, a09, a10 and `{x,y}` to x, y; the first number's leading zeros set the width."""
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
