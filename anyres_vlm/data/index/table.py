"""The index as a Parquet file: its columns, metadata, totals and rejects.

An index has one row per record of a source, with the image sizes and token counts of a sample or the reason for a
reject. Metadata identify what it was built from. Next to `NAME.parquet` lie `NAME.parquet.rejects.jsonl`, the list of
rejects, and `.NAME.parquet.source.json`, the `Stamp` by which an unchanged source is recognised without reading it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from anyres_vlm.data.sources import source_files
from anyres_vlm.errors import DataError, check_bad_records
from anyres_vlm.files import replacing
from anyres_vlm.geometry import Size

FORMAT = 1  # version of the file and of its counts; part of every key
METADATA_KEY = b"anyres_index"
OK = "ok"  # status of a sample

SIDES = pa.list_(pa.int32())
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("row", pa.int64()),  # row of the source, from 0
        ("source", pa.string()),  # name of the source; in a mixture, that of the part with this row
        ("heights", SIDES),  # pixels after EXIF rotation, per image with a readable header
        ("widths", SIDES),
        ("tiles", pa.int32()),
        ("visual_tokens", pa.int32()),  # newlines not included
        ("newline_tokens", pa.int32()),
        ("text_tokens", pa.int32()),
        ("tokens", pa.int32()),  # positions in the model's sequence: the sum of the three above
        ("supervised", pa.int32()),
        ("status", pa.string()),  # `ok` or the kind of reject
        ("reason", pa.string()),  # null if ok
        ("image", pa.string()),  # path of the image file that caused the reject, or null
    ]
)
COUNTS = ("tiles", "visual_tokens", "newline_tokens", "text_tokens", "tokens", "supervised")
TOTALS = ("visual_tokens", "newline_tokens", "text_tokens", "supervised", "tiles")  # in a summary


@dataclass(frozen=True)
class Index:
    """An index file whose columns are read on demand. Arrays have one entry per row of the source, in order."""

    path: Path
    metadata: dict[str, Any]

    @property
    def key(self) -> str:
        """Hash of everything the counts depend on: source, tokenizer, template, tiling and maximum length."""
        return str(self.metadata["key"])

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that are part of the key, in readable form."""
        return dict(self.metadata["settings"])

    @property
    def changes(self) -> dict[str, int]:
        """Number of samples that were changed on reading, by kind of change."""
        return dict(self.metadata.get("changes", {}))

    def batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """Yield the given columns, a few thousand rows at a time."""
        with self._reading(), pq.ParquetFile(self.path) as file:
            yield from file.iter_batches(columns=columns)

    def rejects(self, columns: list[str]) -> Iterator[dict[str, Any]]:
        """Yield the given columns of each reject, which must include `status`."""
        for batch in self.batches(columns):
            yield from batch.filter(pc.not_equal(batch["status"], OK)).to_pylist()

    def column(self, name: str) -> pa.ChunkedArray:
        """Return one column as an Arrow array."""
        with self._reading():
            return pq.read_table(self.path, columns=[name]).column(0)

    def numbers(self, name: str) -> NDArray[np.int64]:
        """Return an integer column. Raises `DataError` if a number is missing or negative."""
        values = self.column(name)
        if values.null_count or (len(values) and pc.min(values).as_py() < 0):
            raise DataError(f"{self.path}: column {name} has missing or negative numbers: rebuild it with anyres index")
        whole: NDArray[np.int64] = values.to_numpy().astype(np.int64)
        return whole

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{self.path}: broken ({reason}): rebuild it with anyres index") from None

    @cached_property
    def row(self) -> NDArray[np.int64]:
        """Row of each record in the source, for `Source.record`."""
        return self.numbers("row")

    @cached_property
    def tokens(self) -> NDArray[np.int64]:
        """Number of positions of each sample in the model's sequence."""
        return self.numbers("tokens")

    @cached_property
    def tiles(self) -> NDArray[np.int64]:
        """Number of tiles of each sample."""
        return self.numbers("tiles")

    @cached_property
    def supervised(self) -> NDArray[np.int64]:
        """Number of positions of each sample that count in the loss."""
        return self.numbers("supervised")

    @cached_property
    def ok(self) -> NDArray[np.bool_]:
        """Mask of the rows that are samples, not rejects."""
        status = self.column("status")
        if status.null_count:
            raise DataError(f"{self.path}: column status has missing values: rebuild it with anyres index")
        mask: NDArray[np.bool_] = pc.equal(status, OK).to_numpy()
        return mask

    @cached_property
    def _names(self) -> pa.ChunkedArray:
        return self.column("id")

    def id(self, index: int) -> str:
        """Return the id of the record at a position of the index."""
        return str(self._names[index].as_py())

    @cached_property
    def _sides(self) -> pa.Table:
        with self._reading():
            return pq.read_table(self.path, columns=["heights", "widths"])

    def sizes(self, index: int) -> tuple[Size, ...]:
        """Return the sizes of the images at a position of the index."""
        heights, widths = (self._sides.column(name)[index].as_py() for name in ("heights", "widths"))
        try:
            return tuple(Size(height=height, width=width) for height, width in zip(heights, widths, strict=True))
        except (TypeError, ValueError):
            raise DataError(
                f"{self.path}: row {index} has heights {heights!r}, widths {widths!r}: rebuild it with anyres index"
            ) from None

    def __len__(self) -> int:
        with self._reading():
            return int(pq.read_metadata(self.path).num_rows)


def read_index(path: Path) -> Index:
    """Open an index. Raises `DataError` for a file that is missing or not an index of this format."""
    try:
        schema = pq.read_schema(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such index; build it with anyres index") from None
    except (OSError, ValueError, pa.ArrowException) as error:  # ValueError: column names that are not UTF-8
        raise DataError(f"{path}: cannot be read as Parquet: {' '.join(str(error).split())}") from None
    if METADATA_KEY not in (schema.metadata or {}):
        raise DataError(f"{path}: a Parquet file, but not built by anyres index")
    try:
        content = json.loads(schema.metadata[METADATA_KEY])
    except (ValueError, RecursionError):
        content = None
    is_complete = isinstance(content, dict) and {"format", "key"} <= content.keys()
    if not is_complete or not isinstance(content.get("settings"), dict):
        raise DataError(f"{path}: the metadata written by anyres index are broken: rebuild it with anyres index")
    if content["format"] != FORMAT:
        raise DataError(
            f"{path}: an index of format {content['format']}, expected {FORMAT}: rebuild it with anyres index"
        )
    if not schema.equals(SCHEMA):
        raise DataError(
            f"{path}: the columns are not those of an index of format {FORMAT}: rebuild it with anyres index"
        )
    return Index(path, content)


def summarise(index: Index) -> dict[str, Any]:
    """Return totals over the good samples and the number of rejects by kind, as JSON values."""
    tokens = index.tokens[index.ok]
    percentiles = np.percentile(tokens, [50, 95]) if len(tokens) else np.zeros(2)
    return {
        "samples": len(index),
        "ok": len(tokens),
        "rejects": count_rejects(index),
        "changes": index.changes,
        "tokens": {
            "total": int(tokens.sum()),
            "mean": round(float(tokens.mean()), 2) if len(tokens) else 0.0,
            "median": float(percentiles[0]),
            "p95": float(percentiles[1]),
            "max": int(tokens.max(initial=0)),
        },
        **{name: int(index.numbers(name)[index.ok].sum()) for name in TOTALS},
        "images": int(num_images(index)[index.ok].sum()),
        "key": index.key,
        "index": str(index.path),
        "rejects_file": str(rejects_path(index.path)),
    }


def num_images(index: Index) -> NDArray[np.int64]:
    """Return the number of images with a readable header in each row."""
    counts: NDArray[np.int64] = pc.list_value_length(index.column("heights")).to_numpy().astype(np.int64)
    return counts


def rejects_path(index: Path) -> Path:
    """Return the path of the list of rejects, next to the index."""
    return index.with_name(f"{index.name}.rejects.jsonl")


def write_rejects(index: Index, path: Path) -> None:
    """Write one JSON object per line and reject: id, row of the source, kind and reason."""
    with replacing(path) as file:
        for reject in index.rejects(["id", "row", "status", "reason"]):
            line = {"id": reject["id"], "row": reject["row"], "kind": reject["status"], "reason": reject["reason"]}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def count_rejects(index: Index) -> dict[str, int]:
    """Return the number of rejects of each kind, most frequent first."""
    counts = {entry["values"]: entry["counts"] for entry in pc.value_counts(index.column("status")).to_pylist()}
    counts.pop(OK, None)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def check_cap(index: Index, max_bad_fraction: float, listed: Path) -> None:
    """Raise `DataError` with the counts by kind if more than the allowed share, or everything, is bad."""
    counts = count_rejects(index)
    if not counts:
        return
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in counts.items())
    first = next(reason for reason in index.column("reason").to_pylist() if reason is not None)
    remedy = f"no index is written. The first: {first}. Fix the records listed in {listed} or raise max_bad_fraction"
    check_bad_records(sum(counts.values()), len(index), max_bad_fraction, kinds, remedy)


def has_repaired_rejects(index: Index) -> bool:
    """Return whether an image that caused a reject has appeared or changed since the index was built."""
    built_ns = index.path.stat().st_mtime_ns
    for reject in index.rejects(["status", "image"]):
        if reject["image"] is None:
            continue
        try:
            changed_ns = Path(reject["image"]).stat().st_mtime_ns
        except OSError:
            continue  # still missing
        if reject["status"] == "missing_file" or changed_ns > built_ns:
            return True
    return False


@dataclass(frozen=True, slots=True)
class Stamp:
    """Names, sizes (bytes) and modification times (ns) of the files of a source, and the name of its image folder."""

    content: dict[str, Any]

    @classmethod
    def take(cls, data: Path, images: Path | None) -> Stamp:
        """Take the stamp of a source without opening its files. Raises `DataError` if a file is missing."""
        stats = {str(path.resolve()): path.stat() for path in source_files(data)}
        files = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
        return cls({"images": None if images is None else str(images.resolve()), "files": files})

    def known_fingerprint(self, target: Path) -> str | None:
        """Return the fingerprint of the source that was saved for this target; None if the stamp has changed since."""
        try:
            saved = json.loads(_stamp_path(target).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return str(saved["fingerprint"]) if saved["look"] == self.content else None

    def save(self, target: Path, fingerprint: str) -> None:
        """Save the stamp and the fingerprint for the next run."""
        content = json.dumps({"look": self.content, "fingerprint": fingerprint})
        _stamp_path(target).write_text(content, encoding="utf-8")


def _stamp_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.source.json")
