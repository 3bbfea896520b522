"""Watches code that reads hostile input: writes elsewhere, processes, executed code, memory and time."""

from __future__ import annotations

import faulthandler
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MEMORY_BYTES = 1 << 30  # above what was in use before
HANG_S = 300  # of the wall clock, which other work stretches: the process ends with a traceback
SLOW_S = 20  # of CPU time
LAUNCHES = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pty.spawn"}
CHANGES = {  # arguments: the paths that change, each with the open folder that it may be relative to
    "os.mkdir": ((0, 2),),
    "os.rename": ((0, 2), (1, 3)),
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.link": ((0, 2), (1, 3)),
    "os.symlink": ((1, 2),),
    "os.truncate": ((0, -1),),
    "os.chmod": ((0, 2),),
}


@dataclass
class Seen:
    """What the watched code did that it must not do."""

    outputs: Path
    watching: bool = False
    found: list[str] = field(default_factory=list)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.watching:
            return
        if event in LAUNCHES or event == "pickle.find_class":
            self.found.append(f"{event} {arguments}")
        elif event == "open":
            path, _, flags = arguments
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not isinstance(path, int):
                self._written(path)
        elif event in CHANGES:
            for place, at in CHANGES[event]:
                path, folder = arguments[place], arguments[at]
                if isinstance(path, (str, bytes, os.PathLike)):
                    in_open_folder = event != "os.truncate" and folder >= 0
                    known = os.readlink(f"/proc/self/fd/{folder}") if in_open_folder else ""
                    self._written(os.path.join(known, os.fsdecode(path)))

    def _written(self, path: Any) -> None:
        whole = Path(os.path.abspath(os.fsdecode(path)))
        if not whole.is_relative_to(self.outputs) and not whole.is_relative_to("/dev"):
            self.found.append(f"wrote {whole}")


_SEEN: list[Seen] = []  # a hook stays for good: one of the process asks the last watch


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _SEEN:
        _SEEN[-1].hook(event, arguments)


sys.addaudithook(_hook)


@contextmanager
def watched(outputs: Path) -> Iterator[None]:
    """Code that may write below `outputs` alone.

    Raises `AssertionError` if it wrote elsewhere, started a process, unpickled a name, took more than 1 GiB of further
    memory or more than 20 s of CPU time, whether it returned or raised. Errors of the code itself pass through. Linux:
    the peak is reset by /proc/self/clear_refs.
    """
    seen = Seen(outputs.resolve())
    Path("/proc/self/clear_refs").write_text("5")
    before, began = _peak_bytes(), time.process_time()
    faulthandler.dump_traceback_later(HANG_S, exit=True)
    _SEEN.append(seen)
    seen.watching = True
    try:
        yield
    finally:
        seen.watching = False
        _SEEN.remove(seen)
        faulthandler.cancel_dump_traceback_later()
        grown, taken = _peak_bytes() - before, time.process_time() - began
        assert not seen.found, seen.found[:5]
        assert grown <= MEMORY_BYTES, f"{grown:,} bytes of further memory, at most {MEMORY_BYTES:,}"
        assert taken <= SLOW_S, f"{taken:.1f} s, at most {SLOW_S}"


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
