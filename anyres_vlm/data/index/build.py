"""Build the index of a source: resumable, reused while nothing changes, and mergeable from shards."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from anyres_vlm.data.index.parts import Parts, Progress
from anyres_vlm.data.index.rejects import check_cap, has_repaired_rejects, rejects_path, write_rejects
from anyres_vlm.data.index.rows import IndexSettings
from anyres_vlm.data.index.stamp import Stamp
from anyres_vlm.data.index.table import FORMAT, METADATA_KEY, SCHEMA, Index, read_index
from anyres_vlm.data.sources import open_source
from anyres_vlm.errors import DataError, UsageError

ROW_GROUP = 65_536


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

    def span(self, rows: int) -> tuple[int, int]:
        """Return the first row and the end."""
        return (self.number - 1) * rows // self.count, self.number * rows // self.count

    def path(self, out: Path) -> Path:
        """Return the path of this shard of an index."""
        return out.with_name(f"{out.stem}.shard-{self.number}-of-{self.count}{out.suffix}")


@dataclass(frozen=True, slots=True)
class Built:
    """Result of `build_index`. `rows_read` is 0 if an existing index was reused.

    `missing` are the shards that are not built yet; if there are any, `index` is this shard.
    """

    index: Index
    rows_read: int
    missing: tuple[Shard, ...] = ()


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
    """Build the index of a source at `out`, with its list of rejects next to it.

    An existing index with the same content and settings is reused. The shard that finishes last merges all shards.
    Raises `DataError` for a broken source and for too many rejects, which are listed although `out` is not written.
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
    """Return the index of the source or shard and the number of rows read; a new index is not yet at `target`."""
    stamp = Stamp.take(data, images)  # before reading, so that the next run notices a change in between
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
    """Merge all shards, with the same bytes as a single run over all rows; the index is not yet at `out`."""
    changes: Counter[str] = Counter()
    for shard in shards:
        changes.update(shard.changes)
    rows = [0, shards[0].metadata["source"]["rows"]]
    metadata = shards[0].metadata | {"rows": rows, "changes": dict(changes)}
    batches = (batch for shard in shards for batch in shard.batches(SCHEMA.names))
    return _write((pa.Table.from_batches([batch]) for batch in batches), out, metadata)


def _write(tables: Iterable[pa.Table], target: Path, metadata: dict[str, Any]) -> Index:
    """Write a complete index durably to a temporary file next to `target`."""
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
    """Move an index to its final path; a reused one is there already."""
    index.path.replace(target)
    return read_index(target)


def _list_and_check(index: Index, out: Path, max_bad_fraction: float) -> None:
    """Write the list of rejects, then raise if there are too many and delete a new index.

    The list of a reused index is not rewritten, because several ranks may reuse it at the same time.
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
    """Return the index at a path if it is up to date."""
    index = _with_key(path, key)
    return None if index is None or has_repaired_rejects(index) else index


def _with_key(path: Path, key: str) -> Index | None:
    """Return the index at a path if there is one with this key."""
    if not path.exists():
        return None
    try:
        index = read_index(path)
    except DataError:  # of another format, or not an index: it is rebuilt
        return None
    return index if index.key == key else None
