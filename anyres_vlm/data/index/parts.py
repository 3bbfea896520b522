"""Part files of an unfinished index, in a hidden folder next to it, written durably by several processes.

A killed run resumes from the parts it finds; parts of other data or settings are deleted.
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

CHUNK = 1024  # rows per part: about half a second of work, so processes finish at about the same time
KEY_FILE = "key"

Progress = Callable[[int, int], None]
"""Called with the numbers of finished rows and of all rows."""


@dataclass(frozen=True)
class Parts:
    """The part files of one target, for rows `start` to `stop`."""

    folder: Path
    start: int
    stop: int

    @classmethod
    def open(cls, target: Path, key: str, start: int, stop: int, *, keep: bool) -> Parts:
        """Open the folder next to the target; empty it if its key differs or `keep` is false."""
        folder = target.with_name(f".{target.name}.parts")
        if not keep or not (folder / KEY_FILE).exists() or (folder / KEY_FILE).read_text(encoding="utf-8") != key:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            (folder / KEY_FILE).write_text(key, encoding="utf-8")
        return cls(folder, start, stop)

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """First row and end of each part, in order."""
        return [(row, min(row + CHUNK, self.stop)) for row in range(self.start, self.stop, CHUNK)]

    def path(self, first: int, end: int) -> Path:
        """Return the path of a part."""
        return self.folder / f"{first}-{end}.arrow"

    def fill(self, source: Source, settings: IndexSettings, workers: int, progress: Progress) -> int:
        """Build the missing parts. Returns the number of rows read."""
        missing = [span for span in self.ranges if not self.path(*span).exists()]
        done = finished = self.stop - self.start - sum(end - first for first, end in missing)
        progress(done, self.stop - self.start)
        with _sequential_tokenizers():
            for rows in _spread(_Job(self, source, settings), missing, min(workers, len(missing))):
                done += rows
                progress(done, self.stop - self.start)
        return done - finished

    def tables(self) -> Iterator[pa.Table]:
        """Yield the parts in order, one in memory at a time."""
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
    """Everything a process needs to build any part."""

    parts: Parts
    source: Source
    settings: IndexSettings

    def run(self, span: tuple[int, int]) -> int:
        """Build one part atomically. Returns its number of rows."""
        table = index_rows(self.source, self.settings, *span)
        with replacing(self.parts.path(*span), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        return int(table.num_rows)


def _spread(job: _Job, spans: list[tuple[int, int]], workers: int) -> Iterator[int]:
    """Run the job on every span, in this process or in several, and yield the numbers of rows."""
    if workers <= 1:
        yield from map(job.run, spans)
        return
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"  # a fork starts faster
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(job, os.getpid())) as pool:
        try:
            yield from pool.map(_run_in_worker, spans)
        except BrokenProcessPool:
            raise DataError(
                "a worker process died, perhaps out of memory: rerun with fewer --workers to resume"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_worker_job: list[_Job] = []  # set once per worker process, as a job is too large to send with every span


def _start_worker(job: _Job, parent: int) -> None:
    _worker_job.append(job)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted as well and reports it
    gc.freeze()  # objects of the parent
    gc.disable()  # the many small objects of a part have no cycles; searching for them took a tenth of the time
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()


def _exit_with_parent(parent: int) -> None:
    """Exit when the parent is gone: if killed, it cannot stop its workers, which would wait forever."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _run_in_worker(span: tuple[int, int]) -> int:
    rows = _worker_job[0].run(span)
    gc.collect()  # tracebacks have cycles
    return rows


@contextmanager
def _sequential_tokenizers() -> Iterator[None]:
    """Disable tokenizer threads: the processes run in parallel already, and Rust threads do not survive a fork."""
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
