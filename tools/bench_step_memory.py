"""Peak memory of a piece of work on the CPU, measured in a process of its own."""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

M_MMAP_THRESHOLD = -3  # of glibc's mallopt


def peak_mb(prepare: Callable[..., Callable[[], Any]], *arguments: Any) -> float:
    """MB by which the work that `prepare(*arguments)` returns raises the resident set of a fresh process at its peak.

    Freed blocks of 64 kB and more go back to the system at once, so that the peak is that of live tensors.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (prepare, arguments))


def _peak(prepare: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...]) -> float:
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    work = prepare(*arguments)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the kernel's peak starts anew
    before = _status("VmRSS")
    work()
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    """kB, as the kernel counts them."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))
