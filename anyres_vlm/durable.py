"""Durable writes: files that are complete or absent, and appended lines that survive a crash."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def replacing(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file, UTF-8 text unless mode is `wb`, that replaces `path` if the block succeeds."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:  # above all on a full disk, which the unfinished file would keep full
        unfinished.unlink(missing_ok=True)
        raise
    sync(path.parent)


def append(path: Path, line: bytes) -> None:
    """Append a line to a file and flush it to disk."""
    with path.open("ab") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def whole_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a log without a last line that a kill cut short; nothing if there is no file."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line


def cut_partial_line(path: Path) -> None:
    """Truncate a log to its whole lines, so that the next `append` starts a line of its own."""
    if path.exists():
        with path.open("rb+") as file:
            file.truncate(_end_of_lines(file.fileno()))


class LineFile:
    """A file of lines, open for appending by this process alone. A last line cut short by a kill is removed."""

    def __init__(self, path: Path) -> None:
        """Raise `BlockingIOError` if another process has the file open for appending."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise
        self.size = _end_of_lines(self._file)
        self._cut()
        sync(path.parent)  # a new file's name is on the disk only after this

    def write(self, lines: bytes) -> None:
        """Append complete lines, which are on the disk when this returns. On a full disk nothing is appended."""
        rest = memoryview(lines)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
            os.fdatasync(self._file)
        except OSError:
            self._cut()
            raise
        self.size += len(lines)

    def close(self) -> None:
        """Close the file and release its lock."""
        os.close(self._file)

    def _cut(self) -> None:
        os.ftruncate(self._file, self.size)
        os.lseek(self._file, 0, os.SEEK_END)


def _end_of_lines(descriptor: int) -> int:
    """Return the length of an open file without a last line that a kill cut short."""
    end = os.lseek(descriptor, 0, os.SEEK_END)
    while end:  # from the end, since a log may be large
        start = max(end - (1 << 16), 0)
        if (found := os.pread(descriptor, end - start, start).rfind(b"\n")) >= 0:
            return start + found + 1
        end = start
    return 0
