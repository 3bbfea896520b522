"""Build an index with several processes, resumably.

Rows are computed in parts, files in a hidden folder next to the index. A rerun after a kill continues from the existing
parts; parts of other data or settings are deleted. The parts are then concatenated to the index file, whose bytes do
not depend on the number of processes, parts or shards.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from anyres_vlm.data.index.rows import CHANGES_KEY, IndexSettings, index_rows
from anyres_vlm.data.index.table import (
    FORMAT,
    METADATA_KEY,
    SCHEMA,
    Index,
    Stamp,
    check_cap,
    has_repaired_rejects,
    read_index,
    rejects_path,
    write_rejects,
)
from anyres_vlm.data.sources import open_source
from anyres_vlm.data.sources.record import Source
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.files import replacing

CHUNK = 1024  # rows per part: about half a second of work, so processes finish at about the same time
ROW_GROUP = 65_536  # rows per row group of the Parquet file
KEY_FILE = "key"  # in the folder of the parts: the key of the index they belong to

Span = tuple[int, int]  # first row, end
Progress = Callable[[int, int], None]
"""Called with the numbers of finished rows and of all rows."""


def build_index(
    data: Path,
    images: Path | None,
    settings: IndexSettings,
    out: Path,
    *,
    workers: int,
    max_bad_fraction: float,
    shard: Shard | None = None,
    rebuild: bool = False,
    progress: Progress = lambda done, total: None,
) -> Built:
    """Build the index of a source at `out`, and write the list of rejects next to it.

    An existing index of the same data and settings is reused unless `rebuild` is set. With `shard`, only that range of
    rows is indexed; the shard that finishes last merges all of them. Raises `DataError` for a broken source and for too
    many rejects; then the list of rejects is written, but not the index.
    """
    target = out if shard is None else shard.path(out)
    if target.is_dir():
        raise UsageError(f"{target}: a folder, expected the name of a Parquet file")
    target.parent.mkdir(parents=True, exist_ok=True)
    made, rows_read = _build(data, images, settings, target, workers, shard, rebuild, progress)
    if shard is not None:
        made = _publish(made, target)
        write_rejects(made, rejects_path(target))
        shards = [Shard(number, shard.count) for number in range(1, shard.count + 1)]
        missing = tuple(other for other in shards if _with_key(other.path(out), made.key) is None)
        if missing:
            return Built(made, rows_read, missing)
        found = _current(out, made.key) if rows_read == 0 else None
        made = found or _merge([read_index(other.path(out)) for other in shards], out)
    _list_and_check(made, out, max_bad_fraction)
    return Built(_publish(made, out), rows_read)


@dataclass(frozen=True, slots=True)
class Built:
    """Result of `build_index`.

    `rows_read` is the number of rows indexed by this call, 0 if an existing index was reused. `missing` are the shards
    that are not built yet; if there are any, `index` is the index of this shard only.
    """

    index: Index
    rows_read: int
    missing: tuple[Shard, ...] = ()


@dataclass(frozen=True, slots=True)
class Shard:
    """One of `count` contiguous ranges of rows; `number` counts from 1."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read `i/n`."""
        match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise UsageError(f"shard {text!r}: expected i/n with i from 1 to n, such as 1/4 to 4/4")
        return cls(int(match[1]), int(match[2]))

    def span(self, rows: int) -> Span:
        return (self.number - 1) * rows // self.count, self.number * rows // self.count

    def path(self, out: Path) -> Path:
        """Return the path of this shard of an index."""
        return out.with_name(f"{out.stem}.shard-{self.number}-of-{self.count}{out.suffix}")


def _build(
    data: Path,
    images: Path | None,
    settings: IndexSettings,
    target: Path,
    workers: int,
    shard: Shard | None,
    rebuild: bool,
    progress: Progress,
) -> tuple[Index, int]:
    """Return the index of the source or shard and the number of rows read; a new index is not at `target` yet."""
    stamp = Stamp.take(data, images)  # before reading, so that the next run notices a change during this one
    known = None if rebuild else stamp.known_fingerprint(target)
    if known is not None and (found := _current(target, settings.key(known))):
        return found, 0
    source = open_source(data, images)
    if len(source) == 0:
        raise DataError(f"{data}: contains no records")
    fingerprint = source.fingerprint()
    key = settings.key(fingerprint)
    if not rebuild and (found := _current(target, key)):
        stamp.save(target, fingerprint)
        return found, 0
    start, stop = (0, len(source)) if shard is None else shard.span(len(source))
    parts = Parts.open(target, key, start, stop, keep=not rebuild)
    rows_read = parts.fill(source, settings, workers, progress)
    metadata = {
        "format": FORMAT,
        "key": key,
        "source": {"name": source.name, "fingerprint": fingerprint, "rows": len(source)},
        "settings": settings.words,
        "rows": [start, stop],
        "changes": parts.changes(),
    }
    made = _write(parts.tables(), target, metadata)
    parts.remove()
    stamp.save(target, fingerprint)
    return made, rows_read


def _merge(shards: Sequence[Index], out: Path) -> Index:
    """Merge all shards to the same bytes as an index built in one run; the index is not at `out` yet."""
    changes: Counter[str] = Counter()
    for shard in shards:
        changes.update(shard.changes)
    rows = [0, shards[0].metadata["source"]["rows"]]
    metadata = shards[0].metadata | {"rows": rows, "changes": dict(changes)}
    batches = (batch for shard in shards for batch in shard.batches(SCHEMA.names))
    return _write((pa.Table.from_batches([batch]) for batch in batches), out, metadata)


def _write(tables: Iterable[pa.Table], target: Path, metadata: dict[str, Any]) -> Index:
    """Write an index to a temporary file next to `target` and flush it to disk."""
    unfinished = target.with_name(f".{target.name}.unfinished")
    schema = SCHEMA.with_metadata({METADATA_KEY: json.dumps(metadata, sort_keys=True)})
    with unfinished.open("wb") as file:
        with pq.ParquetWriter(file, schema, compression="zstd") as writer:
            for group in _row_groups(tables):
                writer.write_table(group.cast(schema), row_group_size=ROW_GROUP)
        file.flush()
        os.fsync(file.fileno())
    return read_index(unfinished)


def _row_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Yield the rows in groups of a fixed size, so that the bytes do not depend on how they were read."""
    held: list[pa.Table] = []
    rows = 0
    for table in tables:
        held.append(table)
        rows += table.num_rows
        while rows >= ROW_GROUP:
            whole = pa.concat_tables(held)
            yield whole.slice(0, ROW_GROUP).combine_chunks()
            held, rows = [whole.slice(ROW_GROUP)], rows - ROW_GROUP
    if rows:
        yield pa.concat_tables(held).combine_chunks()


def _publish(index: Index, target: Path) -> Index:
    """Move an index to its final path, where a reused one is already."""
    index.path.replace(target)
    return read_index(target)


def _list_and_check(index: Index, out: Path, max_bad_fraction: float) -> None:
    """Write the list of rejects. If there are too many, delete the index unless it is a reused one, and raise.

    The list of a reused index is not rewritten, because several ranks may reuse the index at the same time.
    """
    listed = rejects_path(out)
    if index.path != out or not listed.exists():
        write_rejects(index, listed)
    try:
        check_cap(index, max_bad_fraction, listed)
    except DataError:
        if index.path != out:
            index.path.unlink()
        raise


def _current(path: Path, key: str) -> Index | None:
    """Return the index at a path if it has this key and no reject could be read by now; else None."""
    index = _with_key(path, key)
    return None if index is None or has_repaired_rejects(index) else index


def _with_key(path: Path, key: str) -> Index | None:
    """Return the index at a path if it has this key; else None."""
    if not path.exists():
        return None
    try:
        index = read_index(path)
    except DataError:  # another format, or not an index: to be rebuilt
        return None
    return index if index.key == key else None


@dataclass(frozen=True)
class Parts:
    """The part files of one target, for rows `start` to `stop`."""

    folder: Path
    start: int
    stop: int

    @classmethod
    def open(cls, target: Path, key: str, start: int, stop: int, *, keep: bool) -> Parts:
        """Open the folder of parts next to `target`; empty it if its key differs or `keep` is false."""
        folder = target.with_name(f".{target.name}.parts")
        if not keep or not (folder / KEY_FILE).exists() or (folder / KEY_FILE).read_text(encoding="utf-8") != key:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            (folder / KEY_FILE).write_text(key, encoding="utf-8")
        return cls(folder, start, stop)

    @property
    def spans(self) -> list[Span]:
        """The rows of each part, in order."""
        return [(row, min(row + CHUNK, self.stop)) for row in range(self.start, self.stop, CHUNK)]

    def path(self, first: int, end: int) -> Path:
        """Return the path of a part."""
        return self.folder / f"{first}-{end}.arrow"

    def fill(self, source: Source, settings: IndexSettings, workers: int, progress: Progress) -> int:
        """Build the missing parts. Return the number of rows read."""
        missing = [span for span in self.spans if not self.path(*span).exists()]
        done = finished = self.stop - self.start - sum(end - first for first, end in missing)
        progress(done, self.stop - self.start)
        with _sequential_tokenizers():
            for rows in _spread(partial(_build_part, self, source, settings), missing, min(workers, len(missing))):
                done += rows
                progress(done, self.stop - self.start)
        return done - finished

    def tables(self) -> Iterator[pa.Table]:
        """Yield the parts in order, one in memory at a time."""
        for span in self.spans:
            with pa.OSFile(str(self.path(*span))) as file:
                yield pa.ipc.open_file(file).read_all().replace_schema_metadata(None)

    def changes(self) -> dict[str, int]:
        """Return the number of samples that were changed on reading, by kind of change."""
        counts: Counter[str] = Counter()
        for span in self.spans:
            with pa.OSFile(str(self.path(*span))) as file:
                metadata = pa.ipc.open_file(file).schema.metadata or {}
            counts.update(json.loads(metadata.get(CHANGES_KEY, b"{}")))
        return dict(counts)

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder)


def _build_part(parts: Parts, source: Source, settings: IndexSettings, span: Span) -> int:
    """Build one part atomically. Return its number of rows."""
    table = index_rows(source, settings, *span)
    with replacing(parts.path(*span), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    return int(table.num_rows)


def _spread(build: Callable[[Span], int], spans: list[Span], workers: int) -> Iterator[int]:
    """Build the part of every span, in this process or in several, and yield the number of rows of each."""
    if workers <= 1:
        yield from map(build, spans)
        return
    context = multiprocessing.get_context("fork")  # starts faster than spawn
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(build, os.getpid())) as pool:
        try:
            yield from pool.map(_run_in_worker, spans)
        except BrokenProcessPool:
            raise DataError(
                "a worker process was killed, perhaps out of memory: rerun with fewer --workers to resume"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


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


_worker_build: list[Callable[[Span], int]] = []  # set once per worker process: the source is too large for every span


def _start_worker(build: Callable[[Span], int], parent: int) -> None:
    _worker_build.append(build)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent receives it too and reports it
    gc.freeze()  # objects of the parent
    gc.disable()  # collecting the many small objects of a part took a tenth of the time, and they have no cycles
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()


def _exit_with_parent(parent: int) -> None:
    """Exit when the parent is gone: a killed parent cannot stop its workers, which would wait forever."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _run_in_worker(span: Span) -> int:
    rows = _worker_build[0](span)
    gc.collect()  # tracebacks have cycles
    return rows
