"""The unfinished index: part files in a hidden folder beside it, written durably by several processes.

A run that was killed goes on with the parts it finds; parts of other data or settings are thrown away.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from anyres_vlm.data.index.rows import CHANGES_KEY, IndexSettings, index_rows
from anyres_vlm.data.sources.record import Source
from anyres_vlm.durable import replacing
from anyres_vlm.errors import DataError

CHUNK = 1024  # rows of a part: about half a second of work, so that the processes end together
KEY_FILE = "key"

Progress = Callable[[int, int], None]
"""Called with the finished rows and all rows."""


@dataclass(frozen=True)
class Parts:
    """The part files of rows `start` to `stop` for one target."""

    folder: Path
    start: int
    stop: int

    @classmethod
    def open(cls, target: Path, key: str, start: int, stop: int, *, keep: bool) -> Parts:
        """The folder beside the target, emptied if it is of another key or what it holds is not to be kept."""
        folder = target.with_name(f".{target.name}.parts")
        if not keep or not (folder / KEY_FILE).exists() or (folder / KEY_FILE).read_text(encoding="utf-8") != key:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            (folder / KEY_FILE).write_text(key, encoding="utf-8")
        return cls(folder, start, stop)

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """First row and end of every part, in order."""
        return [(row, min(row + CHUNK, self.stop)) for row in range(self.start, self.stop, CHUNK)]

    def path(self, first: int, end: int) -> Path:
        """Where a part lies."""
        return self.folder / f"{first}-{end}.arrow"

    def fill(self, source: Source, settings: IndexSettings, workers: int, progress: Progress) -> int:
        """Make the parts that are missing. Returns the number of rows that were read."""
        missing = [span for span in self.ranges if not self.path(*span).exists()]
        done = already = self.stop - self.start - sum(end - first for first, end in missing)
        progress(done, self.stop - self.start)
        with _sequential_tokenizers():
            for rows in _spread(_Job(self, source, settings), missing, min(workers, len(missing))):
                done += rows
                progress(done, self.stop - self.start)
        return done - already

    def tables(self) -> Iterator[pa.Table]:
        """Yield the parts' rows in order, one part in memory at a time."""
        for span in self.ranges:
            with pa.OSFile(str(self.path(*span))) as file:
                yield pa.ipc.open_file(file).read_all().replace_schema_metadata(None)

    def changes(self) -> dict[str, int]:
        """Count the samples that reading changed, by kind."""
        counts: Counter[str] = Counter()
        for span in self.ranges:
            with pa.OSFile(str(self.path(*span))) as file:
                metadata = pa.ipc.open_file(file).schema.metadata or {}
            counts.update(json.loads(metadata.get(CHANGES_KEY, b"{}")))
        return dict(counts)

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder)


@dataclass(frozen=True)
class _Job:
    """What every process needs to make any part."""

    parts: Parts
    source: Source
    settings: IndexSettings

    def run(self, span: tuple[int, int]) -> int:
        """Make one part, which appears complete or not at all. Returns its rows."""
        table = index_rows(self.source, self.settings, *span)
        with replacing(self.parts.path(*span), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        return int(table.num_rows)


def _spread(job: _Job, spans: list[tuple[int, int]], workers: int) -> Iterator[int]:
    """Run the job on every span, in this process or in several."""
    if workers <= 1:
        yield from map(job.run, spans)
        return
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"  # a fork starts at once
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(job, os.getpid())) as pool:
        try:
            yield from pool.map(_run_in_worker, spans)
        except BrokenProcessPool:
            raise DataError("a process ended early, perhaps for lack of memory: lower --workers and go on") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_worker_job: list[_Job] = []  # of a worker process: set once when it starts, for a job is too large to send with a span


def _start_worker(job: _Job, parent: int) -> None:
    _worker_job.append(job)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and says so
    gc.freeze()  # what the parent made
    gc.disable()  # a part's many small objects have no cycles: looking for them took a tenth of the time
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A killed parent cannot tell its workers to stop; they would wait for it forever."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _run_in_worker(span: tuple[int, int]) -> int:
    rows = _worker_job[0].run(span)
    gc.collect()  # errors' tracebacks do have cycles
    return rows


@contextmanager
def _sequential_tokenizers() -> Iterator[None]:
    """One thread a process: the processes are the parallelism, and Rust threads do not survive a fork."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
