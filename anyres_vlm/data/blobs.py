"""Read bytes by reference: a whole file, a slice of a file, or memory.

No file stays open between calls, so references can be sent to other processes and survive a fork.
"""

from __future__ import annotations

import os
from io import BufferedReader, BytesIO, RawIOBase
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO

from anyres_vlm.errors import DataError

if TYPE_CHECKING:  # start-up time: schema imports numpy, which `anyres tokens` does not need
    from anyres_vlm.schema import ImageRef


SIDECARS = {".ds_store", "thumbs.db", "ehthumbs.db", "desktop.ini"}  # in lower case


def blob_name(blob: Path | ImageRef) -> str:
    """Return the name of the blob for messages."""
    return str(blob) if isinstance(blob, Path) else blob.name


def open_blob(blob: Path | ImageRef) -> BinaryIO:
    """Open a seekable stream of the blob's bytes. Raises `DataError` if the file is missing or cannot be opened."""
    if isinstance(blob, Path):
        return open_file(blob, str(blob))
    if blob.data is not None:
        return BytesIO(blob.data)
    assert blob.path is not None, "a reference has a path or data"
    stream = open_file(blob.path, blob.name)
    if blob.offset == 0 and blob.length is None:
        return stream
    return BufferedReader(_Slice(stream, blob.offset, blob.length))


def read_blob(blob: Path | ImageRef) -> bytes:
    """Read all bytes, a slice with one pread. Raises `DataError` like `open_blob`, and for a slice cut short."""
    if not isinstance(blob, Path):
        if blob.data is not None:
            return blob.data
        if blob.path is not None and blob.length is not None:
            return read_slice(blob.path, blob.offset, blob.length, blob.name)
    with open_blob(blob) as stream:
        try:
            return stream.read()
        except OSError as error:
            raise DataError(f"{blob_name(blob)}: cannot be read ({error.strerror}); check its disk") from None


def read_slice(path: Path, offset: int, length: int, name: str) -> bytes:
    """Read `length` bytes from `offset`; `name` identifies them in a `DataError`."""
    with open_file(path, name) as stream:
        try:
            content = os.pread(stream.fileno(), length, offset)
        except OSError as error:
            raise DataError(f"{name}: cannot be read ({error.strerror}); check its disk") from None
    if len(content) < length:
        raise DataError(
            f"{name}: {path} ends before it: expected {length} bytes at {offset}, got {len(content)}; "
            "the file changed since it was opened"
        )
    return content


def open_file(path: Path, name: str) -> BufferedReader:
    """Open a file for reading; `name` identifies it in a `DataError`."""
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise DataError(f"{name}: no such file; check the path", kind="missing_file") from None
    except IsADirectoryError:
        raise DataError(f"{name}: a folder, not a file") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{name}: cannot be opened ({reason}); check its name and permissions") from None


class _Slice(RawIOBase):
    """A stream over a part of an open file, with its own position; closing it closes the file."""

    def __init__(self, stream: BinaryIO, offset: int, length: int | None) -> None:
        self.stream, self.offset, self.position = stream, offset, 0
        self.length = os.fstat(stream.fileno()).st_size - offset if length is None else length

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        if start + offset < 0:
            raise OSError(22, "Invalid argument")  # as files do; Pillow relies on it for broken images
        self.position = start + offset
        return self.position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # Buffer is Python 3.12's
        wanted = min(len(buffer), max(self.length - self.position, 0))
        content = os.pread(self.stream.fileno(), wanted, self.offset + self.position)
        buffer[: len(content)] = content
        self.position += len(content)
        return len(content)

    def close(self) -> None:
        self.stream.close()
        super().close()


def is_sidecar(name: str) -> bool:
    """Return whether a path names a file that macOS or Windows adds to folders and archives, such as `._*`."""
    parts = PurePosixPath(name).parts
    return bool(parts) and (parts[-1].startswith("._") or parts[-1].lower() in SIDECARS or "__MACOSX" in parts)
