"""Tile features on disk: fixed-size records in append-only files, one pair of files per process.

`NAME.features` holds consecutive bf16 records, `NAME.keys` the key and checksum of each, written after the record. Each
process appends to its own pair, so nothing is locked, renamed or cleaned up: a killed process leaves at most records
without a key and a partial key, which are ignored. Records are read rather than memory-mapped: the page cache serves
both, but for a truncated file a read returns fewer bytes, where a map would kill the process with SIGBUS.
"""

from __future__ import annotations

import logging
import struct
import uuid
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

KEY_BYTES = 16
ENTRY = struct.Struct(f"<{KEY_BYTES}sI")  # key, checksum


class Place(NamedTuple):
    """Location of a record, and its checksum."""

    path: Path
    number: int
    checksum: int


class FeatureStore:
    """Features (P, Dv) by key in `root/name`; all stores under `root` together stay below `max_bytes`.

    A full store keeps its records and takes no new ones: every epoch visits all tiles, so least-recently-used
    replacement would never hit. Two processes that fill the store at the same time may exceed the limit by what one
    call writes.
    """

    def __init__(self, root: Path, name: str, shape: tuple[int, int], max_bytes: int) -> None:
        self.root, self.folder, self.shape, self.max_bytes = root, root / name, shape, max_bytes
        self.record_bytes = 2 * shape[0] * shape[1]
        self._own = self._new_path()
        self._places: dict[bytes, Place] = {}
        self._entries_read: dict[Path, int] = {}
        self._warned: set[Path] = set()
        self._closed = False

    def refresh(self) -> None:
        """Read the keys that this and other processes have written since the last call."""
        for keys in self.folder.glob("*.keys"):
            path = keys.with_suffix(".features")
            try:
                self._read_entries(keys, path)
            except OSError as error:
                self._warn(path, str(error))

    def read(self, key: bytes, out: Tensor) -> bool:
        """Fill `out` (P, Dv), contiguous bf16 on the CPU. Returns False for a missing key or a damaged record."""
        place = self._places.get(key)
        if place is None:
            return False
        record = _bytes_of(out)
        try:
            with place.path.open("rb", buffering=0) as file:
                file.seek(place.number * self.record_bytes)
                whole = file.readinto(record) == self.record_bytes
        except OSError as error:
            self._warn(place.path, str(error))
        else:
            if whole and _checksum(key, record) == place.checksum:
                return True
            self._warn(place.path, f"record {place.number} is damaged")
        del self._places[key]
        return False

    def write(self, keys: Sequence[bytes], features: Tensor) -> None:
        """Add records (N, P, Dv), bf16 on the CPU, while there is space; stop for good after a write error."""
        if self._closed:
            return
        try:
            files = [*self.root.glob("*/*.features"), *self.root.glob("*/*.keys")]
            used = sum(path.stat().st_size for path in files)
            room = max(0, self.max_bytes - used) // (self.record_bytes + ENTRY.size)
            self._append(keys[:room], features[:room])
        except OSError as error:
            self._closed = True
            logger.warning("%s: no more features are cached: %s", self.folder, error)
            return
        if room < len(keys):
            self._closed = True
            logger.warning(
                "%s is full at max_gb=%g: other tiles are encoded every time; raise max_gb, or delete the subfolders "
                "of encoders that you no longer use",
                self.root,
                self.max_bytes / 1e9,
            )

    def _new_path(self) -> Path:
        return self.folder / f"{uuid.uuid4().hex}.features"

    def _append(self, keys: Sequence[bytes], features: Tensor) -> None:
        if not keys:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._own in self._warned:  # removed or truncated in between: keys would no longer match its records
            self._own = self._new_path()
        records = [_bytes_of(record) for record in features]
        entries = [ENTRY.pack(key, _checksum(key, record)) for key, record in zip(keys, records, strict=True)]
        with self._own.open("ab") as file:
            for record in records:
                file.write(record)
        with self._own.with_suffix(".keys").open("ab") as file:
            file.write(b"".join(entries))

    def _read_entries(self, keys: Path, path: Path) -> None:
        known = self._entries_read.get(keys, 0)
        with keys.open("rb") as file:
            file.seek(known * ENTRY.size)
            content = file.read()
        entries = list(ENTRY.iter_unpack(content[: len(content) // ENTRY.size * ENTRY.size]))
        if not entries:
            return
        whole = path.stat().st_size // self.record_bytes - known
        if whole < len(entries):
            self._warn(path, f"{len(entries) - max(whole, 0)} records are missing at its end")
        for number, (key, checksum) in enumerate(entries[: max(whole, 0)], start=known):
            self._places[key] = Place(path, number, checksum)
        self._entries_read[keys] = known + len(entries)

    def _warn(self, path: Path, reason: str) -> None:
        if path not in self._warned:
            self._warned.add(path)
            logger.warning("%s: %s; missing features are computed again", path, reason)


def _bytes_of(record: Tensor) -> memoryview:
    return record.view(torch.uint8).numpy().reshape(-1).data


def _checksum(key: bytes, record: memoryview) -> int:
    return zlib.crc32(record, zlib.crc32(key))
