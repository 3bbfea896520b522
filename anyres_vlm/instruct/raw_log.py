"""Every response as it came, on the disk before it is looked at: what has been paid for is never lost.

A line is a JSON object: `job` (the first), `count`, `batch`, or a response with its item. Appends of many tasks share
one fsync. A line cut short by a kill is the last one, and the next run cuts it off.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from anyres_vlm.data.blobs import open_file
from anyres_vlm.durable import sync
from anyres_vlm.errors import DataError, UsageError

NAME = "responses.jsonl"


def read_log(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Offset and entry of each whole line. Raises `DataError` for a line in the middle that is no entry."""
    with open_file(path, str(path)) as stream:
        offset = 0
        for number, line in enumerate(stream, start=1):
            if not line.endswith(b"\n"):
                return
            yield offset, parse_entry(line, f"{path} line {number}")
            offset += len(line)


def parse_entry(line: bytes, name: str) -> dict[str, Any]:
    """An entry of the log. Raises `DataError` for anything else."""
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    if not isinstance(entry, dict):
        raise DataError(f"{name}: not an entry of a raw log; the file was changed by something else")
    return entry


class RawLog:
    """The log, open for appending by this process alone."""

    def __init__(self, path: Path) -> None:
        """Raises `UsageError` where another process writes it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise UsageError(f"{path}: another process is generating into this folder: wait for it") from None
        self._size = _whole_lines(path)
        os.ftruncate(self._file, self._size)
        os.lseek(self._file, 0, os.SEEK_END)
        sync(path.parent)  # a new file's name is on the disk only when its folder is
        self._waiting: list[tuple[bytes, asyncio.Future[int]]] = []
        self._writer: asyncio.Task[None] | None = None

    async def append(self, entry: dict[str, Any]) -> int:
        """Returns the entry's offset when it is on the disk. Raises `OSError` where it cannot be written."""
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append((json.dumps(entry).encode() + b"\n", done))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write_waiting())
        return await done

    async def close(self) -> None:
        """Write what still waits, close the file and give up the lock."""
        if self._writer is not None:
            await self._writer
        os.close(self._file)

    async def _write_waiting(self) -> None:
        while self._waiting:
            lines, self._waiting = self._waiting, []
            offset = self._size
            try:
                await asyncio.to_thread(self._write, b"".join(line for line, _ in lines))
            except OSError as error:
                for _, done in lines:
                    if not done.done():
                        done.set_exception(error)
                continue
            for line, done in lines:
                if not done.done():  # its task was cancelled
                    done.set_result(offset)
                offset += len(line)

    def _write(self, content: bytes) -> None:
        """All of it or, on a full disk, nothing."""
        rest = memoryview(content)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
            os.fdatasync(self._file)
        except OSError:
            os.ftruncate(self._file, self._size)
            os.lseek(self._file, 0, os.SEEK_END)
            raise
        self._size += len(content)


def _whole_lines(path: Path) -> int:
    """Bytes up to the end of the last whole line."""
    with path.open("rb") as stream:
        end = stream.seek(0, os.SEEK_END)
        while end:
            start = max(end - (1 << 16), 0)
            stream.seek(start)
            found = stream.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0
