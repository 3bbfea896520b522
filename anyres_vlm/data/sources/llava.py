"""LLaVA JSON and JSONL with an image folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from anyres_vlm.data.blobs import open_file, read_slice
from anyres_vlm.data.sources.base import folder_key, image_file, to_record
from anyres_vlm.data.sources.parsing import parse_json, place_in_file
from anyres_vlm.data.sources.scan import Offsets, scan_rows
from anyres_vlm.errors import DataError
from anyres_vlm.schema import Record

BLOCK = 64  # rows of a stream read at once
BLOCK_BYTES = 1 << 24  # if they are no longer than this together; else one


@dataclass(frozen=True, eq=False)
class LlavaSource:
    """A row is an element of the list or a line of the JSONL file; only their byte offsets stay in memory."""

    path: Path
    images: Path
    offsets: Offsets

    @classmethod
    def open(cls, path: Path, images: Path | None) -> LlavaSource:
        """Find the rows. Raises `DataError` for a file that is missing or no list of JSON values."""
        return cls(path, images if images is not None else path.parent, scan_rows(path))

    @property
    def name(self) -> str:
        return self.path.stem

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def records(self, start: int, stop: int) -> Iterator[Record | DataError]:
        """One item a row, in order; a bad row comes as its `DataError`."""
        while start < stop:
            end = min(start + BLOCK, stop)
            if self.offsets[end] - self.offsets[start] > BLOCK_BYTES:
                end = start + 1
            rows = range(start, end)
            start = end
            try:
                contents = self._read(rows)
            except DataError as error:
                yield from (error for _ in rows)
                continue
            for row, content in zip(rows, contents, strict=True):
                try:
                    yield self._record(row, content)
                except DataError as error:
                    yield error

    def record(self, row: int) -> Record:
        """The record of a row, read with one pread. Raises `DataError` for a bad one."""
        (content,) = self._read(range(row, row + 1))
        return self._record(row, content)

    def fingerprint(self) -> str:
        """Of the file's bytes and the image folder's place beside it, not of the images."""
        with open_file(self.path, str(self.path)) as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        return hashlib.sha256(f"llava {content} {folder_key(self.images, self.path)}".encode()).hexdigest()

    def _read(self, rows: range) -> list[bytes]:
        bounds = [int(offset) for offset in self.offsets[rows.start : rows.stop + 1]]
        name = f"{self.path} record {rows.start + 1}"
        content = memoryview(read_slice(self.path, bounds[0], bounds[-1] - 1 - bounds[0], name))
        return [bytes(content[start - bounds[0] : end - 1 - bounds[0]]) for start, end in pairwise(bounds)]

    def _record(self, row: int, content: bytes) -> Record:
        entry = parse_json(content, lambda position: place_in_file(self.path, int(self.offsets[row]) + position))
        return to_record(entry, str(row + 1), lambda item, name: image_file(item, name, self.images))
