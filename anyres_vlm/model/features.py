"""Features of a frozen encoder on disk: a store of fixed-size records, and the cache that reads it first."""

from __future__ import annotations

import hashlib
import logging
import struct
import uuid
import zlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from anyres_vlm.errors import UsageError
from anyres_vlm.model.encoder import Encoder

logger = logging.getLogger(__name__)

KEY_BYTES = 16
ENTRY = struct.Struct(f"<{KEY_BYTES}sI")  # key, checksum
BATCH = 8  # tiles of every call of the encoder


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


class FeatureCache:
    """The encoder's features rounded to bf16, bit for bit the same whether a tile is cached or not.

    To that end the encoder always gets `BATCH` tiles, the last batch filled up with copies: the last bits can depend on
    the number of tiles in a batch, but not on the other tiles (CPU, four small CLIPs, fp32 and bf16, one and two
    threads: with one tile instead of a batch, 5 of 64 tiles changed after rounding; with other tiles in the batch,
    none).
    """

    def __init__(self, encoder: Encoder, root: Path, max_bytes: int) -> None:
        """Create the folder `root`. Raises `UsageError` if that fails."""
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cache_features.folder: {error}; choose a writable folder") from None
        assert not any(parameter.requires_grad for parameter in encoder.parameters()), "only frozen encoders are cached"
        self.encoder, self.root, self.max_bytes = encoder, root, max_bytes
        self.shape = ((encoder.tile // encoder.patch) ** 2, encoder.width)
        self.tile_bytes = 2 * self.shape[0] * self.shape[1]
        self._hits = self._misses = 0

    @torch.no_grad()
    def __call__(self, tiles: Tensor) -> Tensor:
        """Return patch features; equal tiles are encoded once. (T, 3, S, S) uint8 -> (T, P, Dv)."""
        features = torch.empty((len(tiles), *self.shape), dtype=torch.bfloat16)
        keys = [_digest(tile) for tile in tiles.cpu()]
        first = {key: place for place, key in reversed(list(enumerate(keys)))}
        missing = [key for key, place in first.items() if not self.store.read(key, features[place])]
        if missing:
            self.store.refresh()
            missing = [key for key in missing if not self.store.read(key, features[first[key]])]
        places = [first[key] for key in missing]
        for chosen in (places[start : start + BATCH] for start in range(0, len(places), BATCH)):
            features[chosen] = self._encode(tiles[chosen])
        self.store.write(missing, features[places])
        for place, key in enumerate(keys):
            if first[key] != place:
                features[place] = features[first[key]]
        self._misses += len(missing)
        self._hits += len(keys) - len(missing)
        return features.to(tiles.device).to(next(self.encoder.parameters()).dtype)

    def _encode(self, tiles: Tensor) -> Tensor:
        """Encode up to `BATCH` tiles, filled up to that number. (T, 3, S, S) -> (T, P, Dv) bf16 on the CPU."""
        copies = tiles[:1].expand(BATCH - len(tiles), -1, -1, -1)
        features: Tensor = self.encoder(torch.cat([tiles, copies]))[: len(tiles)]
        return features.to("cpu", torch.bfloat16)

    def take_counts(self) -> tuple[int, int]:
        """Return the numbers of cached and of encoded tiles since the last call, and reset them."""
        counts = self._hits, self._misses
        self._hits = self._misses = 0
        return counts

    @cached_property
    def store(self) -> FeatureStore:
        """The store of this encoder, opened at the first tile: device and precision are final by then."""
        name = self._fingerprint()
        logger.info("encoder features are cached in %s", self.root / name)
        return FeatureStore(self.root, name, self.shape, self.max_bytes)

    def _fingerprint(self) -> str:
        """Hash the weights, the batch size and the features of one noise tile.

        The features reflect everything else they depend on: architecture, layers, normalisation, precision, and the
        rounding of the device and library, so features of different machines are never mixed in one run.
        """
        side = self.encoder.tile
        noise = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        digest = hashlib.sha256(BATCH.to_bytes(KEY_BYTES))
        device = next(self.encoder.parameters()).device
        for tensor in [*self.encoder.state_dict().values(), self._encode(noise.to(device))]:
            digest.update(_digest(tensor.cpu()))
        return digest.hexdigest()[: 2 * KEY_BYTES]


def _digest(tensor: Tensor) -> bytes:
    """Return SHA-256 truncated to 16 bytes: 0.19 ms for a tile of 336 pixels, while BLAKE2b takes 0.35 ms."""
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data).digest()[:KEY_BYTES]
