"""A command of this package in a process of its own, which starts with all that is imported here.

Torch and transformers take 5 s of CPU to import; a fork takes them over. That is safe as long as this process neither
computes nor touches a device, which it leaves to its children.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from anyres_vlm.errors import DataError, Interrupted
from anyres_vlm.train.options import SIGNALS

LOG_FILE, OUTPUT_FILE = "log.txt", "output.txt"
POLL_S = 0.5  # between looks at whether a signal came
MODULE = "anyres_vlm"


def run_command(
    words: Sequence[str], folder: Path, lock: int, launch: str | None, is_signalled: Callable[[], bool]
) -> str:
    """What `anyres WORDS` prints; messages go to the folder's log. The process holds the open `lock` until it ends.

    `launch` is put in front, as a launcher of ranks. Raises `DataError` with the last message where the command fails,
    `Interrupted` where a signal ended it or us.
    """
    log = folder / LOG_FILE
    process = multiprocessing.get_context("fork").Process(target=_child, args=(words, folder, lock, launch))
    sys.stdout.flush()  # what is in the buffer would be printed by the child, too
    process.start()
    try:
        is_told = False
        while process.is_alive():
            process.join(POLL_S)
            if is_signalled() and not is_told and process.is_alive():
                process.terminate()
                is_told = True
    except BaseException:  # above all ctrl-c
        process.terminate()
        process.join()
        raise
    if is_signalled() or process.exitcode == os.EX_TEMPFAIL:
        raise Interrupted(f"{folder.name} is saved as far as it came: the same command goes on")
    if process.exitcode != 0:
        message = log.read_text(encoding="utf-8").splitlines()[-1]
        raise DataError(f"{message} (exit status {process.exitcode}; see {log})")
    return (folder / OUTPUT_FILE).read_text(encoding="utf-8")


def _child(words: Sequence[str], folder: Path, lock: int, launch: str | None) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)  # what we catch ourselves, the command may leave alone
    with (folder / OUTPUT_FILE).open("wb") as output, (folder / LOG_FILE).open("ab") as log:
        os.dup2(output.fileno(), 1)
        os.dup2(log.fileno(), 2)
    print("$", *([launch, MODULE] if launch else ["anyres"]), shlex.join(words), file=sys.stderr, flush=True)
    if launch is not None:
        os.set_inheritable(lock, True)
        command = [*shlex.split(launch), MODULE, *words]
        os.execvp(command[0], command)
    sys.argv = ["anyres", *words]
    runpy.run_module(MODULE, run_name="__main__")
