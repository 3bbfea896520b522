"""Signals that stop a run: it saves and leaves after the current step, or is ended if that step does not end.

Light to import: `anyres train` catches signals before it imports torch.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # Slurm's warning, a preemption, Kubernetes' eviction
LEAST_S = 60.0  # from a signal until the watchdog ends the process
STEPS = 5  # or so many times the last step, if that is longer
POLL_S = 0.2


@contextmanager
def catch_signals() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM and SIGUSR1 set, instead of ending the process, while the block runs."""
    received = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # Python installs handlers in the main thread alone
        yield received
        return
    before = {number: signal.signal(number, lambda *_: received.set()) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Watchdog:
    """Ends the process with exit status 75 if a caught signal has no effect: the main thread may be stuck in C.

    Python runs signal handlers in the main thread, once it returns from C, and a collective whose other ranks are gone
    does not return. The interpreter's wakeup file descriptor is written at once, and a thread reads it. Without `with`,
    the watchdog does nothing. It cannot help against C code that keeps the interpreter's lock; torch releases it.
    """

    def __init__(self, least_s: float = LEAST_S) -> None:
        self.least_s = least_s
        self.before_leaving: Callable[[], str] = lambda: "rerun the same command"  # returns the end of the message
        self._last_step_s = 0.0
        self._is_paused = False
        self._closed = threading.Event()
        self._writer: socket.socket | None = None

    @property
    def limit_s(self) -> float:
        """Seconds from a signal to the end of the process."""
        return max(self.least_s, STEPS * self._last_step_s)

    def stepped(self, seconds: float) -> None:
        """Note how long a step took."""
        self._last_step_s = seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time of this block: writing a checkpoint may take long, and must not be cut short."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def __enter__(self) -> Watchdog:
        if threading.current_thread() is threading.main_thread():  # no other can set the file descriptor
            reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            # Data loader workers inherit the file descriptor, but a signal to one of them is none to this process.
            os.register_at_fork(after_in_child=self._forget)
            threading.Thread(target=self._watch, args=(reader,), name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._forget()

    def _forget(self) -> None:
        if self._writer is not None:
            signal.set_wakeup_fd(-1)
            self._writer.close()
            self._writer = None

    def _watch(self, reader: socket.socket) -> None:
        with reader:
            while not set(received := reader.recv(64)) & set(SIGNALS):
                if not received:  # closed
                    return
        since = time.monotonic()
        while not self._closed.wait(POLL_S):
            if self._is_paused:
                since = time.monotonic()
            elif time.monotonic() - since > self.limit_s:
                self._leave()

    def _leave(self) -> None:
        try:
            rest = self.before_leaving()
        except Exception as error:  # whatever it is, the process must end
            rest = f"rerun the same command ({error})"
        words = f"the run did not stop within {self.limit_s:.0f} s of the signal, perhaps because another rank is gone"
        print(f"interrupted: {words}: {rest}", file=sys.stderr, flush=True)
        os._exit(os.EX_TEMPFAIL)
