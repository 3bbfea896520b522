"""Mix several sources: a YAML file lists them, and how many rows of each to take.

    sources:
      - {path: llava.json, images: coco, fraction: 0.25, seed: 1}
      - {path: charts/, first: 1000}
      - {path: shards/, random: 1000, seed: 7}
      - {path: ocr.parquet, weight: 2.5}  # all rows twice, and a random half of them once more

LLaVA-NeXT's layout is read too:

    datasets:
      - {json_path: llava.json, sampling_strategy: all}
      - {json_path: charts.json, sampling_strategy: "first:10%", images: charts}  # or end:500, random:20%

In that layout a share is rounded up, and a number above the size of the file takes the whole file, as in LLaVA-NeXT;
`random` uses the `seed` of the entry, 0 by default; `images` is optional and replaces the image folder of the run.

Paths are relative to the folder of the YAML file. The choice of rows depends only on the seed and the number of rows,
so it is the same on every rank and machine, and a larger share with the same seed contains the smaller one. Rows of a
source keep their order. Record ids are prefixed with the name of the source, as `ocr/17`; a repetition is `ocr/17#2`.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import compress
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from anyres_vlm.config import Frozen, Positive, Rate, read_mapping, validated
from anyres_vlm.data.sources.open import find_files, open_single
from anyres_vlm.data.sources.record import Source
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.schema import Record

DENSE = 4  # read a range of rows as a stream if at least one in this many is wanted, else row by row
Rows = NDArray[np.int64]

STRATEGY = re.compile(r"(all|first|end|random)(?::(\d+)|:(\d+(?:\.\d+)?)%)?")


class Part(Frozen):
    """One source of a mixture. Without `fraction`, `first`, `random` or `weight`, all rows are used once."""

    path: Path  # JSON, JSON Lines, Parquet or tar, relative to the mixture's folder
    images: Path | None = None  # image folder; null: the folder of the data file
    fraction: Rate | None = None  # use this share of the rows, chosen at random
    first: Positive | None = None  # use this number of rows, from the start
    random: Positive | None = None  # use this number of rows, chosen at random
    weight: Annotated[float, Field(gt=0, le=1000)] | None = None  # 2.5 uses all rows twice and a random half once more
    seed: Annotated[int, Field(ge=0)] = 0  # seed of the random choice

    @model_validator(mode="after")
    def _one_share(self) -> Part:
        given = [key for key in ("fraction", "first", "random", "weight") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of fraction, first, random and weight, not {' and '.join(given)}")
        return self

    def rows(self, size: int) -> Rows:
        """Choose rows of a source of `size` rows, ascending; with a weight, whole repetitions and then a random rest.

        Raises `DataError` when the source has fewer rows than asked for, or none are left.
        """
        asked = self.first or self.random
        if asked is not None and asked > size:
            key = "first" if self.first is not None else "random"
            raise DataError(f"{key}={asked}, but it has {size} records: lower it, or repeat records with weight")
        if self.first is not None:
            return np.arange(self.first)
        if self.random is not None:
            return _random_rows(size, self.random, self.seed)
        share = self.fraction or self.weight or 1.0
        total = round(share * size)
        if total == 0:
            raise DataError(f"{share:g} of {size} records is none: raise the share or leave the source out")
        whole, rest = divmod(total, size)
        return np.concatenate([np.tile(np.arange(size), whole), _random_rows(size, rest, self.seed)])


class Mixture(Frozen):
    """The content of a mixture file."""

    sources: tuple[Part, ...]  # sources in the order of their rows


class Dataset(Frozen):
    """One source of a mixture in LLaVA-NeXT's layout."""

    json_path: Path  # JSON, JSONL, Parquet or tar, relative to the mixture's folder
    sampling_strategy: str = "all"  # all, or first, end or random with :N rows or :N% of them
    images: Path | None = None  # image folder; null: that of the run
    seed: Annotated[int, Field(ge=0)] = 0  # seed of `random`

    @property
    def path(self) -> Path:
        """The data, as in `Part`."""
        return self.json_path

    @field_validator("sampling_strategy")
    @classmethod
    def _is_known(cls, strategy: str) -> str:
        match = STRATEGY.fullmatch(strategy.strip())
        if match is None or (match[1] == "all" and match.lastindex != 1):
            raise ValueError("expected all, or first, end or random with a number, such as first:1000 or random:10%")
        return strategy.strip()

    def rows(self, size: int) -> Rows:
        """Choose rows of a source of `size` rows; without a number every strategy takes all of them.

        Raises `DataError` when none are left.
        """
        match = STRATEGY.fullmatch(self.sampling_strategy)
        assert match is not None, "validated"
        strategy, number, percent = match.groups()
        count = size
        if number is not None or percent is not None:
            count = min(size, int(number) if number is not None else math.ceil(Fraction(percent) * size / 100))
        if count == 0:
            raise DataError(f"sampling_strategy {self.sampling_strategy} of {size} records is none: raise it")
        if strategy == "random":
            return _random_rows(size, count, self.seed)
        return np.arange(size - count, size) if strategy == "end" else np.arange(count)


class Datasets(Frozen):
    """The content of a mixture file in LLaVA-NeXT's layout."""

    datasets: tuple[Dataset, ...]  # sources in the order of their rows


@dataclass(frozen=True, eq=False)
class MixtureSource:
    """The chosen rows of several sources, one source after another."""

    path: Path
    sources: tuple[Source, ...]
    names: tuple[str, ...]
    chosen: tuple[Rows, ...]  # rows of each source; repetitions follow after all rows
    starts: Rows  # (sources + 1,)

    @classmethod
    def open(cls, path: Path, images: Path | None = None) -> MixtureSource:
        """Open every source and choose its rows; `images` is the image folder of LLaVA-NeXT's layout.

        Raises `UsageError` for an invalid mixture, and `DataError` for a source that is missing, broken or too small.
        """
        parts = _read(path)
        if images is not None and isinstance(parts[0], Part):
            raise UsageError(f"{path}: a mixture names the image folder of each source itself: leave {images} out")
        sources, chosen = [], []
        for number, part in enumerate(parts, start=1):
            folder = images if part.images is None else _resolve(part.images, path)
            try:
                source = open_single(_resolve(part.path, path), folder)
                if len(source) == 0:
                    raise DataError("contains no records")
                rows = part.rows(len(source))
            except DataError as error:
                raise DataError(f"{path} source {number}: {error}") from None
            sources.append(source)
            chosen.append(rows)
        starts = np.cumsum([0, *map(len, chosen)])
        return cls(path, tuple(sources), _distinct([source.name for source in sources]), tuple(chosen), starts)

    @property
    def name(self) -> str:
        return self.path.stem

    def __len__(self) -> int:
        return int(self.starts[-1])

    def records(self, start: int, stop: int) -> Iterator[Record | DataError]:
        """Yield one item per row, in order; for a bad row, its `DataError`."""
        for number, chosen in enumerate(self.chosen):
            first = max(start - int(self.starts[number]), 0)
            rows = chosen[first : max(stop - int(self.starts[number]), 0)]
            for at, item in enumerate(_items(self.sources[number], rows), start=first):
                yield self._own(item, number, at)

    def record(self, row: int) -> Record:
        """Return the record of a row. Raises `DataError` for a bad one."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        at = row - int(self.starts[number])
        own = self._own(next(_items(self.sources[number], self.chosen[number][at : at + 1])), number, at)
        if isinstance(own, DataError):
            raise own
        return own

    def origin(self, row: int) -> str:
        """Return the name of the source of a row."""
        return self.names[int(np.searchsorted(self.starts, row, side="right")) - 1]

    def fingerprint(self) -> str:
        """Return the hash of the fingerprints and names of the sources and of the chosen rows."""
        digest = hashlib.sha256(b"mixture")
        for source, name, chosen in zip(self.sources, self.names, self.chosen, strict=True):
            digest.update(f"{source.fingerprint()} {name!r} {len(chosen)} ".encode() + chosen.astype("<i8").tobytes())
        return digest.hexdigest()

    def _own(self, item: Record | DataError, number: int, at: int) -> Record | DataError:
        """Return the record with its id in the mixture, or the error with the name of its source."""
        if isinstance(item, DataError):
            record = None if item.record is None else f"{self.names[number]}/{item.record}"
            return DataError(f"{self.names[number]}: {item}", kind=item.kind, record=record)
        repetition = at // len(self.sources[number]) + 1
        mark = f"#{repetition}" if repetition > 1 else ""
        return replace(item, id=f"{self.names[number]}/{item.id}{mark}")


def mixture_files(path: Path) -> list[Path]:
    """Return the YAML file and the files of its sources, without opening those."""
    return [path, *(file for part in _read(path) for file in find_files(_resolve(part.path, path)))]


def _read(path: Path) -> tuple[Part | Dataset, ...]:
    if not path.exists():
        raise DataError(f"{path}: no such file; expected a YAML mixture")
    content = read_mapping(path)
    parts: tuple[Part | Dataset, ...]
    key = "datasets" if "datasets" in content and "sources" not in content else "sources"
    if key == "datasets":
        parts = validated(Datasets, content, path).datasets
    else:
        parts = validated(Mixture, content, path).sources
    if not parts:
        raise UsageError(f"config {path}: {key} is empty: list at least one")
    return parts


def _items(source: Source, rows: Rows) -> Iterator[Record | DataError]:
    """Yield rows in the given order. A dense range of rows is read as one stream, and the rows between are skipped."""
    for ascending in np.split(rows, np.flatnonzero(np.diff(rows) <= 0) + 1):
        if len(ascending) > 1 and ascending[-1] - ascending[0] < DENSE * len(ascending):
            wanted = np.zeros(ascending[-1] + 1 - ascending[0], bool)
            wanted[ascending - ascending[0]] = True
            yield from compress(source.records(int(ascending[0]), int(ascending[-1]) + 1), wanted)
            continue
        for row in map(int, ascending):
            try:
                yield source.record(row)
            except DataError as error:
                yield error


def _random_rows(size: int, count: int, seed: int) -> Rows:
    """Distinct rows, ascending. The raw stream of a bit generator, unlike a Generator's, is fixed for all versions."""
    if count == 0:
        return np.zeros(0, np.int64)
    keys = np.random.PCG64(seed).random_raw(size)
    return np.sort(np.argsort(keys, kind="stable")[:count])


def _resolve(path: Path, mixture: Path) -> Path:
    return mixture.parent / path.expanduser()


def _distinct(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names, with numbers added to equal ones."""
    taken: list[str] = []
    for name in names:
        number, free = 1, name
        while free in taken:
            number += 1
            free = f"{name}-{number}"
        taken.append(free)
    return tuple(taken)
