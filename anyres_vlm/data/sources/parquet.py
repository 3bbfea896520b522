"""Parquet files with the images inside, in the layout of Hugging Face's `datasets`."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from anyres_vlm.data.blobs import open_file, read_slice
from anyres_vlm.data.sources.paths import image_file
from anyres_vlm.data.sources.record import CONVERSATION_KEYS, READ_KEYS, folder_key, key_meaning, shards_name, to_record
from anyres_vlm.errors import DataError
from anyres_vlm.schema import ImageRef, Record

CACHED_GROUPS = 2  # row groups kept for random access; no more than two neighbours, because they can be large
BATCH = 64  # rows turned into Python objects at once
FOOTER_END = 8  # bytes: the footer's length and the magic number
BROKEN = (OSError, ValueError, pa.ArrowException)  # ValueError: text that is no UTF-8, a row that is missing


class _Cursor:
    """Reads the rows of one row group forwards, a few at a time."""

    def __init__(self, path: Path, group: int, columns: list[str]) -> None:
        self.process = os.getpid()
        self.path, self.group = path, group
        file = pq.ParquetFile(path, pre_buffer=False)
        self.batches = file.iter_batches(BATCH, row_groups=[group], columns=columns, use_threads=False)
        self.batch: pa.RecordBatch | None = None
        self.first = 0  # row of the group that the batch begins with

    def reaches(self, path: Path, group: int, row: int) -> bool:
        """Return whether it can continue to a row: not backwards, and not if the file was opened before a fork."""
        return (self.process, self.path, self.group) == (os.getpid(), path, group) and row >= self.first

    def entries(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Rows as Python objects."""
        while start < stop:
            if self.batch is None or start >= self.first + self.batch.num_rows:
                self.first += 0 if self.batch is None else self.batch.num_rows
                self.batch = next(self.batches, None)
                if self.batch is None:
                    raise pa.ArrowInvalid("it has fewer rows than the footer states")
                continue
            part = self.batch.slice(start - self.first, stop - start).to_pylist()
            start += len(part)
            yield from part


class ParquetSource:
    """Rows of one or more Parquet files, in order. At most two row groups are kept in memory.

    An image is a struct of `bytes` and `path`, plain binary, a path, or a list of these; the path is used if there are
    no bytes. Random access to a row reads its whole row group, so groups of about a hundred rows are best.
    """

    def __init__(self, files: Sequence[Path], images: Path | None) -> None:
        """Read the footers. Raises `DataError` for a file that is missing, broken or lacks the conversation."""
        self.files = tuple(files)
        self.images = images if images is not None else self.files[0].parent
        self.columns: list[list[str]] = []
        groups: list[tuple[int, int, int]] = []
        self.file_starts = [0]
        for number, path in enumerate(self.files):
            footer = _footer(path)
            self.file_starts.append(self.file_starts[-1] + footer.num_rows)
            self.columns.append(_columns(footer, path))
            groups += [(number, group, footer.row_group(group).num_rows) for group in range(footer.num_row_groups)]
        self.groups = [(number, group) for number, group, _ in groups]
        self.starts: NDArray[np.int64] = np.cumsum([0, *(rows for *_, rows in groups)])
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()
        self._cursor: _Cursor | None = None  # where the last stream ended and the next may continue

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict(), "_cursor": None}

    @property
    def name(self) -> str:
        return shards_name(self.files)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def records(self, start: int, stop: int) -> Iterator[Record | DataError]:
        """Yield one item per row, in order; every row group is read once, a few rows at a time."""
        for group in range(self._group_of(start), len(self.groups)):
            first = int(self.starts[group])
            if first >= stop:
                return
            row, end = max(start, first), min(stop, int(self.starts[group + 1]))
            try:
                cursor = self._take_cursor(group, row - first)
                for entry in cursor.entries(row - first, end - first):
                    row += 1
                    yield self._record(entry, row - 1)
                self._cursor = cursor
            except BROKEN as error:
                for unread in range(row, end):
                    yield self._broken(unread, error)

    def record(self, row: int) -> Record:
        """Return the record of a row. Raises `DataError` for a bad one."""
        group = self._group_of(row)
        try:
            table = self._table(group)
            (entry,) = table.slice(row - int(self.starts[group]), 1).to_pylist()
        except BROKEN as error:
            raise self._broken(row, error) from None
        record = self._record(entry, row)
        if isinstance(record, DataError):
            raise record
        return record

    def fingerprint(self) -> str:
        """Return the hash of the sizes and footers (schema, counts, offsets, statistics), not of all the data."""
        digest = hashlib.sha256(f"parquet {folder_key(self.images, self.files[0])}".encode())
        for path in self.files:
            with open_file(path, str(path)) as stream:
                size = stream.seek(0, os.SEEK_END)
            ending = read_slice(path, size - FOOTER_END, FOOTER_END, str(path))
            length = int.from_bytes(ending[:4], "little")
            digest.update(f"{size} ".encode() + read_slice(path, size - FOOTER_END - length, length, str(path)))
        return digest.hexdigest()

    def _group_of(self, row: int) -> int:
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def _take_cursor(self, group: int, row: int) -> _Cursor:
        """Return the cursor of the last stream if it reaches the row, and do not share it; else a new one."""
        number, group_in_file = self.groups[group]
        path, cursor = self.files[number], self._cursor
        self._cursor = None
        if cursor is not None and cursor.reaches(path, group_in_file, row):
            return cursor
        return _Cursor(path, group_in_file, self.columns[number])

    def _table(self, group: int) -> pa.Table:
        if group not in self._cache:
            number, group_in_file = self.groups[group]
            with pq.ParquetFile(self.files[number], pre_buffer=False) as file:
                self._cache[group] = file.read_row_group(group_in_file, columns=self.columns[number], use_threads=False)
            if len(self._cache) > CACHED_GROUPS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(group)
        return self._cache[group]

    def _record(self, entry: dict[str, Any], row: int) -> Record | DataError:
        def find_image(item: Any, name: str) -> ImageRef:
            content, path = (item.get("bytes"), item.get("path")) if isinstance(item, dict) else (item, item)
            if isinstance(content, bytes):
                return ImageRef(f"{self._place(row)}, image of record {name}", data=content)
            return image_file(path, name, self.images)

        try:
            return to_record(entry, str(row + 1), find_image)
        except DataError as error:
            return error

    def _broken(self, row: int, error: Exception) -> DataError:
        reason = " ".join(str(error).split())
        return DataError(f"{self._place(row)}: the row group cannot be read ({reason}); fetch the file again")

    def _place(self, row: int) -> str:
        number = self.groups[self._group_of(row)][0]
        return f"{self.files[number]} row {row - self.file_starts[number] + 1}"


def _footer(path: Path) -> pq.FileMetaData:
    with open_file(path, str(path)) as stream:
        try:
            return pq.read_metadata(stream)
        except BROKEN as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{path}: not a whole Parquet file ({reason}); fetch it again") from None


def _columns(footer: pq.FileMetaData, path: Path) -> list[str]:
    """Return the columns to read. Raises `DataError` if none of them is a conversation."""
    found = footer.schema.to_arrow_schema().names
    if not set(found) & set(CONVERSATION_KEYS):
        raise DataError(
            f"{path}: expected a column {', '.join(CONVERSATION_KEYS[:-1])} or {CONVERSATION_KEYS[-1]}, "
            f"got {', '.join(found[:20])}"
        )
    return [name for name in found if name in READ_KEYS or key_meaning(name) is not None]
