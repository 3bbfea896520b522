"""Who works on what: a lock that ends with its process, however that ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path

LOCK_FILE = "lock"


@contextmanager
def claim(folder: Path, *, wait: bool = False) -> Iterator[int | None]:
    """The open lock of a folder, or None where another process has it and we do not wait.

    A child that inherits it keeps the claim until it ends, too: where its parent is killed, nobody starts its work a
    second time beside it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("a") as file:
        try:
            flock(file, LOCK_EX if wait else LOCK_EX | LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield file.fileno()
