"""The jobs of a sweep: stage 1 once for all cells that share it, then stage 2 and the measures of each cell.

Any number of processes can work on a sweep. A lock on its folder claims a job, and each job runs `anyres` commands in
child processes: memory, devices and crashes belong to one cell, and a launcher can start several ranks.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import runpy
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fcntl import LOCK_EX, LOCK_NB, flock
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from anyres_vlm.ablate.sweep import Cell, Measure, Sweep
from anyres_vlm.config import PictureKind, StageName
from anyres_vlm.errors import DataError, Interrupted, UsageError, did_you_mean
from anyres_vlm.files import replacing
from anyres_vlm.synthetic.dataset import DATA_FILE, Purpose, write_dataset
from anyres_vlm.train.options import CONFIG_FILE, model_folder
from anyres_vlm.train.signals import SIGNALS

logger = logging.getLogger(__name__)

LOCK_FILE, LOG_FILE, OUTPUT_FILE, RESULT_FILE = "lock", "log.txt", "output.txt", "result.json"
POLL_S = 0.5  # between checks for a signal
MODULE = "anyres_vlm"

Scores = dict[str, Any]
"""The JSON that each measure's command printed, by `measure_key`."""


@dataclass(frozen=True)
class Job:
    """Work with a folder of its own. `run` gets the open lock of the folder, for child processes to inherit."""

    folder: Path
    is_done: Callable[[], bool]
    run: Callable[[int], None]
    needs: tuple[Job, ...] = ()


def work(jobs: Sequence[Job], pause: Callable[[], None]) -> list[Job]:
    """Run jobs until all are done, here or in other processes. Returns the failed ones and those that need them.

    A `DataError` fails one job; any other error ends the work. `pause` waits while other processes run all the rest.
    """
    failed: list[Job] = []
    while True:
        failed += [job for job in jobs if job not in failed and any(need in failed for need in job.needs)]
        left = [job for job in jobs if job not in failed and not job.is_done()]
        if not left:
            return failed
        ready = (job for job in left if all(need.is_done() for need in job.needs))
        if not any(_attempt(job, failed, f"{len(left)} of {len(jobs)} jobs are left") for job in ready):
            pause()


def _attempt(job: Job, failed: list[Job], left: str) -> bool:
    """Run a job unless another process has claimed it; return whether it was claimed here."""
    with claim(job.folder) as lock:
        if lock is None:
            return False
        try:
            if not job.is_done():  # another process may have finished it in the meantime
                logger.info("%s starts; %s", job.folder.name, left)
                job.run(lock)
        except DataError as error:
            logger.error("%s failed: %s", job.folder.name, error)
            failed.append(job)
        return True


@contextmanager
def claim(folder: Path, *, wait: bool = False) -> Iterator[int | None]:
    """Lock a folder; the open lock file, or None if another process has it and `wait` is not set.

    The lock ends with its process. A child process that inherits it keeps it, so no other process starts the same work
    while a killed parent's child is still running.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("a") as file:
        try:
            flock(file, LOCK_EX if wait else LOCK_EX | LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield file.fileno()


@dataclass(frozen=True)
class SweepRun:
    """A sweep and the folder of its results."""

    sweep: Sweep
    out: Path
    is_signalled: Callable[[], bool] = lambda: False

    def folder(self, cell: Cell) -> Path:
        """Return a cell's folder, which keeps its name if an axis is renamed or added."""
        return next((self.out / "cells").glob(f"*-{cell.key}"), self.out / "cells" / cell.name)

    def jobs(self, cells: Sequence[Cell]) -> list[Job]:
        """Return a job for each cell and for each stage 1 that cells need."""
        first: dict[str, Job] = {}
        jobs: list[Job] = []
        for cell in cells:
            if cell.stage1_key is not None and cell.stage1_key not in first:
                folder = self.out / "stage1" / cell.stage1_key
                is_done = model_folder(folder, "stage1").is_dir
                first[cell.stage1_key] = job = Job(folder, is_done, partial(self._train, cell, "stage1", folder))
                jobs.append(job)
            needs = (first[cell.stage1_key],) if cell.stage1_key is not None else ()
            jobs.append(Job(self.folder(cell), partial(self._is_finished, cell), partial(self._finish, cell), needs))
        return jobs

    def pause(self) -> None:
        """Wait a moment. Raises `Interrupted` after a signal."""
        if self.is_signalled():
            raise Interrupted("finished jobs are kept; rerun to resume")
        time.sleep(POLL_S)

    def _is_finished(self, cell: Cell) -> bool:
        scores = read_scores(self.folder(cell))
        return all(measure_key(measure) in scores for measure in self.sweep.measure)

    def _finish(self, cell: Cell, lock: int) -> None:
        folder = self.folder(cell)
        if cell.stage1_key is not None:
            _link(folder / "stage1", self.out / "stage1" / cell.stage1_key / "stage1")
        self._train(cell, "stage2", folder, lock)
        scores = read_scores(folder)
        about = {"choices": dict(cell.choices), "seed": cell.seed, "key": cell.key, "stage1": cell.stage1_key}
        found: dict[str, float | None] = {}
        for measure in self.sweep.measure:
            key = measure_key(measure)
            if key not in scores:
                scores[key] = self._measure(measure, folder, lock)
            found |= numbers(measure, scores[key])  # a wrong path shows with the first cell
            with replacing(folder / RESULT_FILE) as file:
                file.write(json.dumps({**about, "scores": scores}, indent=1) + "\n")
        shown = ", ".join(f"{title} {'-' if value is None else format(value, '.1f')}" for title, value in found.items())
        logger.info("%s: %s", folder.name, shown)

    def _train(self, cell: Cell, stage: StageName, folder: Path, lock: int) -> None:
        data = cell.config.stage(stage).data
        if data.rendered is not None and data.samples is not None:
            _link(folder / "data" / data.rendered, self._rendered(data.rendered, data.samples, cell.seed, data.kinds))
        config = folder / CONFIG_FILE
        config.write_text(yaml.safe_dump(cell.config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
        words = ["train", "--config", str(config), "--output", str(folder), "--stage", stage.removeprefix("stage")]
        start = time.monotonic()
        words += ["--skip-stage1"] if cell.skip_stage1 else []
        run_command(words, folder, lock, self.sweep.launch, self.is_signalled)
        logger.info("%s: %s in %.0f s", folder.name, stage, time.monotonic() - start)
        shutil.rmtree(folder / stage / "checkpoints", ignore_errors=True)  # a finished stage does not need them

    def _measure(self, measure: Measure, folder: Path, lock: int) -> object:
        words = [*shlex.split(measure.run), "--model", str(model_folder(folder, "stage2")), "--json"]
        if measure.rendered is not None:
            words += ["--data", str(self._rendered("heldout", measure.rendered, 0) / DATA_FILE)]
        text = run_command(words, folder, lock, None, self.is_signalled)
        try:
            return json.loads(text)
        except ValueError:
            raise DataError(f"anyres {measure.run} printed no JSON: {text[:200]!r}") from None

    def _rendered(self, purpose: Purpose, count: int, seed: int, kinds: tuple[PictureKind, ...] | None = None) -> Path:
        """Render data that the cells share, unless it exists; return its folder."""
        folder = self.out / "data" / "-".join([purpose, *(kinds or ()), str(count), f"seed{seed}"])
        with claim(folder.with_name(f".{folder.name}.claim"), wait=True):
            write_dataset(folder, purpose, count, seed, kinds)
        return folder


def _link(link: Path, target: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(os.path.relpath(target, link.parent))


def measure_key(measure: Measure) -> str:
    """Return a key of the command and its data; which numbers the table shows does not matter."""
    asked = measure.model_dump_json(include={"run", "rendered"})
    return f"{measure.run} {hashlib.sha256(asked.encode()).hexdigest()[:8]}"


def read_scores(cell: Path) -> Scores:
    """Read what has been measured so far. Raises `DataError` for a broken file."""
    path = cell / RESULT_FILE
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["scores"])
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: expected the scores of a cell ({error}); delete it to measure again") from None


def numbers(measure: Measure, scores: Any) -> dict[str, float | None]:
    """Return the table's numbers by title; None where the command printed null, such as an error without counts.

    Raises `UsageError` for a path that is not in the scores.
    """
    flat = dict(_flatten(scores))
    found: dict[str, float | None] = {}
    for title, paths in measure.numbers.items():
        values = []
        for path in [paths] if isinstance(paths, str) else paths:
            if path not in flat:
                hint = did_you_mean(path, list(flat)) or f"; known: {', '.join(list(flat)[:8])}"
                raise UsageError(f"measure {measure.run!r}: no number {path} in its scores{hint}")
            values.append(flat[path])
        known = [value for value in values if value is not None]
        found[title] = measure.scale * fmean(known) if len(known) == len(values) else None
    return found


def _flatten(scores: Any, prefix: str = "") -> Iterator[tuple[str, float | None]]:
    """Yield numbers and nulls by dotted path."""
    for key, value in scores.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        elif value is None or isinstance(value, (int, float)):
            yield f"{prefix}{key}", value


def run_command(
    words: Sequence[str], folder: Path, lock: int, launch: str | None, is_signalled: Callable[[], bool]
) -> str:
    """Run `anyres WORDS` in a child process and return what it prints; its messages go to the folder's log.

    The child holds the open `lock` until it ends. `launch` is a launcher of ranks in front of the command. Without one,
    the child is a fork and need not import torch and transformers again, which takes 5 s; that is safe because this
    process never computes or uses a device. Raises `DataError` with the last message if the command fails,
    `Interrupted` if a signal ended it.
    """
    log = folder / LOG_FILE
    process = multiprocessing.get_context("fork").Process(target=_child, args=(words, folder, lock, launch))
    sys.stdout.flush()  # otherwise the child prints the buffered text too
    process.start()
    try:
        is_terminated = False
        while process.is_alive():
            process.join(POLL_S)
            if is_signalled() and not is_terminated and process.is_alive():
                process.terminate()
                is_terminated = True
    except BaseException:  # Ctrl-C above all
        process.terminate()
        process.join()
        raise
    if is_signalled() or process.exitcode == os.EX_TEMPFAIL:
        raise Interrupted(f"{folder.name} is saved; rerun to resume")
    if process.exitcode != 0:
        message = log.read_text(encoding="utf-8").splitlines()[-1]
        raise DataError(f"{message} (exit status {process.exitcode}; see {log})")
    return (folder / OUTPUT_FILE).read_text(encoding="utf-8")


def _child(words: Sequence[str], folder: Path, lock: int, launch: str | None) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)  # the command may leave alone what the parent catches
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
