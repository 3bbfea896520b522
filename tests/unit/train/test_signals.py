"""A signal ends a process whose main thread is stuck in C, and only that one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from anyres_vlm.train.signals import LEAST_S, Watchdog, catch_signals

STUCK = """
import ctypes, os, signal, sys, time
from anyres_vlm.train.signals import Watchdog, catch_signals

libc, lock = ctypes.CDLL(None), ctypes.create_string_buffer(64)
with catch_signals(), Watchdog(least_s=1) as watchdog:
    watchdog.before_leaving = lambda: {words}
    libc.pthread_mutex_lock(lock)
    print("ready", flush=True)
    libc.pthread_mutex_lock(lock)  # a deadlock, in which no Python handler runs
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize(
    ("words", "said"), [("'rerun it'", ": rerun it\n"), ("1 / 0", ": rerun the same command (division by zero)\n")]
)
def test_a_process_stuck_in_c_leaves_with_75(number: signal.Signals, words: str, said: str) -> None:
    command = [sys.executable, "-c", STUCK.format(words=words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    sent = time.monotonic()
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == os.EX_TEMPFAIL
    assert time.monotonic() - sent > 1
    assert errors.startswith("interrupted: the run did not stop within 1 s of the signal")
    assert errors.endswith(said)


def test_the_limit_is_a_minute_or_five_steps() -> None:
    watchdog = Watchdog()
    assert watchdog.limit_s == LEAST_S == 60
    watchdog.stepped(3)
    assert watchdog.limit_s == 60
    watchdog.stepped(40)
    assert watchdog.limit_s == 200


@pytest.fixture
def watchdog(monkeypatch: pytest.MonkeyPatch) -> Watchdog:
    """A watchdog that counts what would end this process."""
    watchdog = Watchdog(least_s=0.4)
    watchdog.left = []
    monkeypatch.setattr(watchdog, "_leave", lambda: watchdog.left.append(time.monotonic()))
    return watchdog


def test_time_in_which_a_checkpoint_is_written_is_not_counted(watchdog: Watchdog) -> None:
    with catch_signals() as received, watchdog:
        with watchdog.paused():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1.5)
            assert received.is_set()
            assert not watchdog.left
        time.sleep(1.5)
        assert watchdog.left


def test_a_run_that_stops_in_time_is_left_alone(watchdog: Watchdog) -> None:
    with catch_signals() as received, watchdog:
        os.kill(os.getpid(), signal.SIGTERM)
        assert received.wait(10)
    time.sleep(1)
    assert not watchdog.left
    assert signal.set_wakeup_fd(-1) == -1


def test_a_signal_to_a_forked_worker_is_not_one_to_this_process(watchdog: Watchdog) -> None:
    with catch_signals() as received, watchdog:
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(3,))
        worker.start()
        assert worker.pid is not None
        time.sleep(0.3)
        os.kill(worker.pid, signal.SIGTERM)
        worker.join()
        time.sleep(1)
        assert not received.is_set()
        assert not watchdog.left
        os.kill(os.getpid(), signal.SIGTERM)  # the worker has left the parent's pipe as it was
        time.sleep(1.5)
        assert watchdog.left
