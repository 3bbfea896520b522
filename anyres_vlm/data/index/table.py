"""The index as a Parquet file: its columns, its metadata and the numpy view that the planner and the trainer read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from anyres_vlm.errors import DataError
from anyres_vlm.geometry import Size

FORMAT = 1  # of the file and of the counts in it; part of every key
METADATA_KEY = b"anyres_index"
OK = "ok"

SIDES = pa.list_(pa.int32())
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("row", pa.int64()),  # of the data, from 0
        ("source", pa.string()),  # name of the source; in a mixture, of the one that the row is from
        ("heights", SIDES),  # pixels as shown, one an image whose header could be read
        ("widths", SIDES),
        ("tiles", pa.int32()),
        ("visual_tokens", pa.int32()),  # newlines not included
        ("newline_tokens", pa.int32()),
        ("text_tokens", pa.int32()),
        ("tokens", pa.int32()),  # positions of the model's sequence: the three above together
        ("supervised", pa.int32()),
        ("status", pa.string()),  # `ok` or the kind of the reject
        ("reason", pa.string()),  # null where ok
        ("image", pa.string()),  # the image file at fault, null where none is
    ]
)
COUNTS = ("tiles", "visual_tokens", "newline_tokens", "text_tokens", "tokens", "supervised")


@dataclass(frozen=True)
class Index:
    """An index file, read column by column as it is needed. Arrays have one entry a row of the source, in order."""

    path: Path
    metadata: dict[str, Any]

    @property
    def key(self) -> str:
        """Hash over source, tokenizer, template, tiling and longest sample: what the counts follow from."""
        return str(self.metadata["key"])

    @property
    def settings(self) -> dict[str, Any]:
        """What the key was made of, in words."""
        return dict(self.metadata["settings"])

    @property
    def changes(self) -> dict[str, int]:
        """How many samples were changed while they were read, by kind."""
        return dict(self.metadata.get("changes", {}))

    def batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """Some columns, a few thousand rows at a time."""
        with self._reading(), pq.ParquetFile(self.path) as file:
            yield from file.iter_batches(columns=columns)

    def column(self, name: str) -> pa.ChunkedArray:
        """One column as Arrow has it."""
        with self._reading():
            return pq.read_table(self.path, columns=[name]).column(0)

    def numbers(self, name: str) -> NDArray[np.int64]:
        """One of the integer columns. Raises `DataError` where a number is missing or below 0."""
        values = self.column(name)
        if values.null_count or (len(values) and pc.min(values).as_py() < 0):
            raise DataError(f"{self.path}: {name} lacks numbers or has some below 0: make it again with anyres index")
        whole: NDArray[np.int64] = values.to_numpy().astype(np.int64)
        return whole

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{self.path}: broken ({reason}): make it again with anyres index") from None

    @cached_property
    def row(self) -> NDArray[np.int64]:
        """Rows of the source, for `Source.record`."""
        return self.numbers("row")

    @cached_property
    def tokens(self) -> NDArray[np.int64]:
        """Positions that each sample takes in the model's sequence."""
        return self.numbers("tokens")

    @cached_property
    def tiles(self) -> NDArray[np.int64]:
        """Tiles for the encoder."""
        return self.numbers("tiles")

    @cached_property
    def supervised(self) -> NDArray[np.int64]:
        """Positions that count in the loss."""
        return self.numbers("supervised")

    @cached_property
    def ok(self) -> NDArray[np.bool_]:
        """Which rows are samples; the others are rejects."""
        with self._reading():
            status = pq.read_table(self.path, columns=["status"], read_dictionary=["status"]).column(0)
        if status.null_count:
            raise DataError(f"{self.path}: status lacks words: make it again with anyres index")
        return np.concatenate([np.zeros(0, bool), *(_is_ok(chunk) for chunk in status.chunks)])

    @cached_property
    def _names(self) -> pa.ChunkedArray:
        return self.column("id")

    def id(self, index: int) -> str:
        """The record's id at a position of the index."""
        return str(self._names[index].as_py())

    @cached_property
    def _sides(self) -> pa.Table:
        with self._reading():
            return pq.read_table(self.path, columns=["heights", "widths"])

    def sizes(self, index: int) -> tuple[Size, ...]:
        """The sizes of the images at a position of the index."""
        heights, widths = (self._sides.column(name)[index].as_py() for name in ("heights", "widths"))
        try:
            return tuple(Size(height=height, width=width) for height, width in zip(heights, widths, strict=True))
        except (TypeError, ValueError):
            raise DataError(
                f"{self.path}: row {index} has heights {heights!r}, widths {widths!r}: make it again with anyres index"
            ) from None

    def __len__(self) -> int:
        with self._reading():
            return int(pq.read_metadata(self.path).num_rows)


def read_index(path: Path) -> Index:
    """Open an index. Raises `DataError` for a file that is missing or is none of this version."""
    try:
        schema = pq.read_schema(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such index; make it with anyres index") from None
    except (OSError, ValueError, pa.ArrowException) as error:  # ValueError: names that are no UTF-8
        raise DataError(f"{path}: cannot be read as Parquet: {' '.join(str(error).split())}") from None
    if METADATA_KEY not in (schema.metadata or {}):
        raise DataError(f"{path}: Parquet, but not made by anyres index")
    try:
        content = json.loads(schema.metadata[METADATA_KEY])
    except (ValueError, RecursionError):
        content = None
    known = isinstance(content, dict) and {"format", "key"} <= content.keys()
    if not known or not isinstance(content.get("settings"), dict):
        raise DataError(f"{path}: the note of anyres index in it is broken: make it again")
    if content["format"] != FORMAT:
        raise DataError(f"{path}: an index of format {content['format']}, expected {FORMAT}: make it again")
    if not schema.equals(SCHEMA):
        raise DataError(f"{path}: its columns are not those of an index of format {FORMAT}: make it again")
    return Index(path, content)


def _is_ok(chunk: pa.DictionaryArray) -> NDArray[np.bool_]:
    words = np.array([word == OK for word in chunk.dictionary.to_pylist()], bool)
    chosen: NDArray[np.bool_] = words[chunk.indices.to_numpy()]
    return chosen
