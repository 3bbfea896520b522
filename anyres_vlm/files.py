"""Durable writes, which survive a crash, and safe YAML.

A file is either replaced as a whole (`replacing`) or appended to line by line (`append`, `LineFile`). Readers of such
logs ignore a last line that a kill cut short (`whole_lines`).
"""

from __future__ import annotations

import fcntl
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import yaml

MOST_NODES = 100_000  # keys and values of a YAML document, aliases expanded
MOST_DIGITS = 100  # of an integer in YAML; Python refuses to print one of 5000 digits
YAML_INTEGER = "tag:yaml.org,2002:int"


@contextmanager
def replacing(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file that replaces `path` when the block succeeds. It is UTF-8 text unless `mode` is `wb`."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:  # mostly a full disk, where the unfinished file would take up space
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
    """Yield the complete lines of a log, without a last one that a kill cut short; none if the file does not exist."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line


def cut_partial_line(path: Path) -> None:
    """Truncate a log to its complete lines, so that the next `append` starts a new line."""
    if path.exists():
        with path.open("rb+") as file:
            file.truncate(_end_of_lines(file.fileno()))


class LineFile:
    """A log opened for appending by one process only. An incomplete last line is removed on opening."""

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
        sync(path.parent)  # puts the name of a new file on the disk

    def write(self, lines: bytes) -> None:
        """Append complete lines and flush them to disk. If that fails, as on a full disk, nothing is appended."""
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
    """Return the length in bytes of the complete lines of an open file."""
    end = os.lseek(descriptor, 0, os.SEEK_END)
    while end:  # searched from the end, because a log may be large
        start = max(end - (1 << 16), 0)
        if (found := os.pread(descriptor, end - start, start).rfind(b"\n")) >= 0:
            return start + found + 1
        end = start
    return 0


def parse_yaml(text: str) -> Any:
    """Parse one YAML document. Raises `ValueError` with a one-line reason, also for duplicate keys."""
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # PyYAML lets Python's own exceptions through, as for `!!int x`, 5000 digits or the 31st of February.
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


def _count(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Return the number of nodes with aliases expanded. Raises `ValueError` for too many, cycles and duplicate keys.

    `sizes` holds the count of each node already visited, 0 while it is being counted.
    """
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise ValueError("an alias refers to a node that contains it")
        return sizes[id(node)]
    sizes[id(node)], total = 0, 1
    if node.tag == YAML_INTEGER and len(node.value) > MOST_DIGITS:
        raise ValueError(f"a number of {len(node.value):,} digits, expected at most {MOST_DIGITS}")
    if isinstance(node, yaml.MappingNode):
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if duplicates := [key for key, count in keys.items() if count > 1]:
            raise ValueError(f"duplicate key {duplicates[0]!r}")
        total += sum(_count(key, sizes) + _count(value, sizes) for key, value in node.value)
    elif isinstance(node, yaml.SequenceNode):
        total += sum(_count(item, sizes) for item in node.value)
    if total > MOST_NODES:
        raise ValueError(f"it has more than {MOST_NODES:,} entries with aliases expanded")
    sizes[id(node)] = total
    return total
