"""Signals that ask a run to leave: Slurm's warning, a preemption, Kubernetes' eviction."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
MARKER = "interrupted"  # launchers report their own exit status, so job scripts look for this file in the output folder


@contextmanager
def catch_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM or SIGUSR1 sets in place of ending the process, while the block runs."""
    received = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # where Python lets nobody install a handler
        yield received
        return
    before = {number: signal.signal(number, lambda *_: received.set()) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def mark(output: Path, reason: str) -> None:
    """Leave the marker that says the run wants to be started again."""
    (output / MARKER).write_text(reason + "\n", encoding="utf-8")


def unmark(output: Path) -> None:
    """Take the marker away: the run has been started again."""
    (output / MARKER).unlink(missing_ok=True)
