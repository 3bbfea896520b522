"""WebDataset tar shards: members found by offset, each read with one pread."""

from __future__ import annotations

import hashlib
import logging
import re
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from anyres_vlm.data.blobs import is_sidecar, open_file, read_blob, read_slice
from anyres_vlm.data.headers import IMAGE_SUFFIXES
from anyres_vlm.data.sources.record import (
    CONVERSATION_KEYS,
    REMEDIES,
    key_meaning,
    parse_json,
    place_in_text,
    shards_name,
    to_record,
)
from anyres_vlm.errors import DataError, RejectKind
from anyres_vlm.schema import IMAGE_TOKEN, ImageRef, Record

logger = logging.getLogger(__name__)

BLOCK = tarfile.BLOCKSIZE
PADDING_READ = 1 << 20  # bytes to check after the end mark; tar usually pads to 10 kB
MEMBER = re.compile(r"(?P<key>(?:.*/)?[^./][^./]*)\.(?P<suffix>[^/]+)", re.DOTALL)
DIGITS = re.compile(r"(\d+)")
REFUSED_SUFFIXES: dict[str, RejectKind] = {
    **dict.fromkeys(("mp4", "m4v", "webm", "avi", "mov", "mkv", "mpg", "mpeg", "wmv", "flv"), "video"),
    **dict.fromkeys(("wav", "mp3", "flac", "ogg", "m4a", "opus", "aac", "wma"), "audio"),
}


@dataclass(frozen=True, eq=False)
class Shard:
    """Offsets of the members of one tar. Sample i has the members from `firsts[i]` to `firsts[i + 1]` (exclusive)."""

    path: Path
    digest: str  # of the names, offsets, sizes and times of the members
    keys: pa.StringArray  # (samples,)
    firsts: NDArray[np.int64]  # (samples + 1,)
    suffixes: pa.DictionaryArray  # (members,) in lower case
    offsets: NDArray[np.int64]  # (members,) first byte of the member's data
    lengths: NDArray[np.int64]  # (members,)

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, sample: int) -> str:
        """Return the key of a sample, the common part of its members' names."""
        return str(self.keys[sample].as_py())

    def members(self, sample: int) -> dict[str, ImageRef]:
        """Return the members of a sample by suffix in lower case. Raises `DataError` if two have the same suffix."""
        key = self.key(sample)
        found: dict[str, ImageRef] = {}
        for member in range(int(self.firsts[sample]), int(self.firsts[sample + 1])):
            suffix = str(self.suffixes[member].as_py())
            if suffix in found:
                raise DataError(f"record {key}: {self.path} has two neighbours {key}.{suffix}: rename one")
            place = int(self.offsets[member]), int(self.lengths[member])
            found[suffix] = ImageRef(f"{self.path}: {key}.{suffix}", self.path, *place)
        return found


class WebDatasetSource:
    """Samples of tar shards: consecutive members whose file names agree up to the first dot.

    Images are the members with an image suffix, in the natural order of what precedes it (`a.jpg`, `a.1.jpg`,
    `a.2.jpg`, `a.10.jpg`). The text is a `.json` member with a LLaVA entry, or else a `.txt` member with a caption. A
    sample with video or audio is rejected; other members are not read. Memory holds about 40 bytes per member.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        """Scan the tars' headers. Raises `DataError` for a tar that is missing, compressed, broken or cut short."""
        self.shards = tuple(scan_shard(path) for path in files)
        self.starts: NDArray[np.int64] = np.cumsum([0, *map(len, self.shards)])

    @property
    def name(self) -> str:
        return shards_name([shard.path for shard in self.shards])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def records(self, start: int, stop: int) -> Iterator[Record | DataError]:
        """Yield one item per row, in order; for a bad row, its `DataError`."""
        for row in range(start, stop):
            try:
                yield self.record(row)
            except DataError as error:
                yield error

    def record(self, row: int) -> Record:
        """Return the record of a row; its images are slices of the tar. Raises `DataError` for a bad one."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        shard, sample = self.shards[number], row - int(self.starts[number])
        members, key = shard.members(sample), shard.key(sample)
        for suffix in members:
            if (kind := REFUSED_SUFFIXES.get(suffix.rpartition(".")[2])) is not None:
                raise DataError(f"record {key}: it has a .{suffix}: {REMEDIES[kind]}", kind=kind, record=key)
        images = sorted(filter(_is_image, members), key=_image_order)
        entry = _entry(members, key, len(images))
        if isinstance(entry, dict):
            entry = {**entry, "image": None, "images": [members[suffix] for suffix in images]}
        return to_record(entry, key, lambda item, name: item)

    def fingerprint(self) -> str:
        """Return the hash of the texts and of the names, offsets, sizes and times of all members, not of their data."""
        digest = hashlib.sha256(b"webdataset")
        for shard in self.shards:
            digest.update(shard.digest.encode())
            for member, suffix in enumerate(shard.suffixes.to_pylist()):
                if suffix in ("json", "txt"):
                    place = int(shard.offsets[member]), int(shard.lengths[member])
                    digest.update(read_slice(shard.path, *place, str(shard.path)))
        return digest.hexdigest()


def scan_shard(path: Path) -> Shard:
    """Read a tar's headers, not its data. Raises `DataError` for a tar that is compressed, broken or cut short."""
    keys: list[str] = []
    suffixes: list[str] = []
    firsts, offsets, lengths = (array("q") for _ in range(3))
    digest = hashlib.sha256()
    sidecars = 0
    with open_file(path, str(path)) as stream:
        for member in _members(stream, path):
            digest.update(f"{member.name!r} {member.offset_data} {member.size} {member.mtime}\n".encode())
            if is_sidecar(member.name):
                sidecars += 1
                continue
            match = MEMBER.fullmatch(member.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
            if not member.isreg() or match is None:
                continue
            if member.issparse():
                raise DataError(f"{path}: {member.name} is stored sparse: pack the shard without --sparse")
            if not keys or match["key"] != keys[-1]:
                keys.append(match["key"])
                firsts.append(len(offsets))
            suffixes.append(match["suffix"].lower())
            offsets.append(member.offset_data)
            lengths.append(member.size)
    firsts.append(len(offsets))
    if sidecars:
        logger.info("%s: %d files of macOS or Windows (._*, .DS_Store, ...) are skipped", path, sidecars)
    return Shard(
        path=path,
        digest=digest.hexdigest(),
        keys=pa.array(keys, pa.string()),
        firsts=np.array(firsts, np.int64),
        suffixes=pa.array(suffixes, pa.string()).dictionary_encode(),
        offsets=np.array(offsets, np.int64),
        lengths=np.array(lengths, np.int64),
    )


def _members(stream: BinaryIO, path: Path) -> Iterator[tarfile.TarInfo]:
    """Yield all members, then check the end of the tar, because `tarfile` accepts garbage as an end."""
    try:
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            place = -1
            while (member := archive.next()) is not None:
                if member.offset <= place or not 0 <= member.size < 1 << 62:
                    raise tarfile.ReadError("a header that points backwards or nowhere")
                place = member.offset
                yield member
                archive.members = []  # type: ignore[attr-defined]  # or it keeps all of them
            end = archive.offset
    except (tarfile.TarError, EOFError, OSError, OverflowError, ValueError) as error:
        raise DataError(f"{path}: a broken or truncated tar ({error}): fetch it again") from None
    stream.seek(end)
    ending = stream.read(PADDING_READ)
    if len(ending) < BLOCK:
        raise DataError(f"{path}: the tar is cut short: no end mark at byte {end}; fetch it again")
    if any(ending[:BLOCK]):
        raise DataError(f"{path}: a broken tar: no header at byte {end}; fetch it again")
    if any(ending):
        raise DataError(f"{path}: data after the tar's end at byte {end}: join tars with tar --concatenate, not cat")


def _entry(members: dict[str, ImageRef], key: str, num_images: int) -> Any:
    """Return the LLaVA entry of a sample, either its `.json` member or one made from its caption."""
    entry = None
    if "json" in members:
        content, name = read_blob(members["json"]), members["json"].name
        entry = parse_json(content, lambda position: place_in_text(name, content, position))
        if "txt" not in members or (isinstance(entry, dict) and entry.keys() & set(CONVERSATION_KEYS)):
            return entry  # else it is metadata of the caption, as written by img2dataset
    if "txt" not in members:
        raise DataError(f"record {key}: expected a .json or .txt member, got .{', .'.join(members)}")
    try:
        caption = read_blob(members["txt"]).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{members['txt'].name}: cannot be read as UTF-8 text: {error.reason}") from None
    question = "\n".join([IMAGE_TOKEN] * num_images)
    kept = {name: entry[name] for name in entry if key_meaning(name) is not None} if isinstance(entry, dict) else {}
    return {**kept, "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": caption}]}


def _is_image(suffix: str) -> bool:
    return f".{suffix.rpartition('.')[2].lower()}" in IMAGE_SUFFIXES


def _image_order(suffix: str) -> list[str | int]:
    """Return a sort key that orders numbers by value; a split at digits alternates between text and numbers."""
    middle = suffix.rpartition(".")[0]
    return [int(part) if place % 2 else part for place, part in enumerate(DIGITS.split(middle))]
