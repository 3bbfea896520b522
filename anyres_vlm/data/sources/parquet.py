"""Parquet files with the images inside, in the layout of Hugging Face's `datasets`."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from anyres_vlm.data.blobs import open_file, read_slice
from anyres_vlm.data.sources.base import CONVERSATION_KEYS, folder_key, image_file, to_record
from anyres_vlm.errors import DataError
from anyres_vlm.schema import ImageRef, Record

COLUMNS = ("id", "task", "image", "images", *CONVERSATION_KEYS)  # those that are read, where a file has them
CACHED_GROUPS = 2  # row groups kept for random access: neighbours of a border, not more, for they can be large
BATCH = 64  # rows turned into Python objects at once
FOOTER_END = 8  # bytes: the footer's length and the magic number
MAGIC = b"PAR1"
BROKEN = (OSError, pa.ArrowException)


class ParquetSource:
    """A row is a row of the files one behind another. Memory holds where row groups begin, and two of them at most.

    An image is a struct of `bytes` and `path`, plain binary, a path, or a list of these; a path counts where there are
    no bytes. Reading one row reads its row group: random access wants groups of a hundred rows, not of all.
    """

    def __init__(self, files: Sequence[Path], images: Path | None) -> None:
        """Read the footers. Raises `DataError` for a file that is missing, broken or lacks the conversation."""
        self.files = tuple(files)
        self.images = images if images is not None else self.files[0].parent
        self.columns: list[list[str]] = []
        groups: list[tuple[int, int, int]] = []
        for number, path in enumerate(self.files):
            footer = _footer(path)
            self.columns.append(_columns(footer, path))
            groups += [(number, group, footer.row_group(group).num_rows) for group in range(footer.num_row_groups)]
        self.groups = [(number, group) for number, group, _ in groups]
        self.starts: NDArray[np.int64] = np.cumsum([0, *(rows for *_, rows in groups)])
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict()}

    @property
    def name(self) -> str:
        return self.files[0].stem if len(self.files) == 1 else self.files[0].parent.name

    def __len__(self) -> int:
        return int(self.starts[-1])

    def records(self, start: int, stop: int) -> Iterator[Record | DataError]:
        """One item a row, in order; every row group is read once, a few rows at a time."""
        for group in range(self._group_of(start), len(self.groups)):
            first = int(self.starts[group])
            if first >= stop:
                return
            row, end = max(start, first), min(stop, int(self.starts[group + 1]))
            try:
                for entry in self._entries(group, row - first, end - first):
                    row += 1
                    yield self._record(entry, row - 1)
            except BROKEN as error:
                for unread in range(row, end):
                    yield self._broken(unread, error)

    def record(self, row: int) -> Record:
        """The record of a row. Raises `DataError` for a bad one."""
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
        """Of the files' sizes and footers (schema, counts, offsets, statistics): the data may be hundreds of GB."""
        digest = hashlib.sha256(f"parquet {folder_key(self.images, self.files[0])}".encode())
        for path in self.files:
            with open_file(path, str(path)) as stream:
                size = stream.seek(0, 2)
            ending = read_slice(path, size - FOOTER_END, FOOTER_END, str(path))
            length = int.from_bytes(ending[:4], "little")
            digest.update(f"{size} ".encode() + read_slice(path, size - FOOTER_END - length, length, str(path)))
        return digest.hexdigest()

    def _group_of(self, row: int) -> int:
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def _open(self, group: int) -> tuple[pq.ParquetFile, int, list[str]]:
        number, group_in_file = self.groups[group]
        return pq.ParquetFile(self.files[number], pre_buffer=False), group_in_file, self.columns[number]

    def _table(self, group: int) -> pa.Table:
        if group not in self._cache:
            file, group_in_file, columns = self._open(group)
            with file:
                self._cache[group] = file.read_row_group(group_in_file, columns=columns, use_threads=False)
            if len(self._cache) > CACHED_GROUPS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(group)
        return self._cache[group]

    def _entries(self, group: int, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Rows from `start` to `stop` of a row group as Python objects."""
        file, group_in_file, columns = self._open(group)
        with file:
            at = 0
            for batch in file.iter_batches(BATCH, row_groups=[group_in_file], columns=columns, use_threads=False):
                yield from batch.slice(max(start - at, 0), max(stop - max(start, at), 0)).to_pylist()
                at += batch.num_rows
                if at >= stop:
                    return

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
        group = self._group_of(row)
        number = self.groups[group][0]
        first = next(index for index, (file, _) in enumerate(self.groups) if file == number)
        return f"{self.files[number]} row {row - int(self.starts[first]) + 1}"


def _footer(path: Path) -> pq.FileMetaData:
    with open_file(path, str(path)) as stream:
        try:
            return pq.read_metadata(stream)
        except BROKEN as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{path}: not a whole Parquet file ({reason}); fetch it again") from None


def _columns(footer: pq.FileMetaData, path: Path) -> list[str]:
    """The columns to read: the first conversation that there is, and what goes with it."""
    found = footer.schema.to_arrow_schema().names
    if not set(found) & set(CONVERSATION_KEYS):
        raise DataError(
            f"{path}: expected a column {', '.join(CONVERSATION_KEYS[:-1])} or {CONVERSATION_KEYS[-1]}, "
            f"got {', '.join(found[:20])}"
        )
    return [name for name in COLUMNS if name in found]
