"""Rejected records of an index: count them by kind, list them in a file, and limit their share."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.compute as pc

from anyres_vlm.data.index.table import OK, Index
from anyres_vlm.durable import replacing
from anyres_vlm.errors import DataError

LISTED = ["id", "row", "status", "reason"]


def rejects_path(index: Path) -> Path:
    """Return the path of the list of rejects, next to the index."""
    return index.with_name(f"{index.name}.rejects.jsonl")


def write_rejects(index: Index, path: Path) -> None:
    """Write one JSON object per reject and line: id, row of the source, kind and reason."""
    with replacing(path) as file:
        for batch in index.batches(LISTED):
            for reject in batch.filter(pc.not_equal(batch["status"], OK)).to_pylist():
                kind = reject.pop("status")
                line = {"id": reject["id"], "row": reject["row"], "kind": kind, "reason": reject["reason"]}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def count_rejects(index: Index) -> dict[str, int]:
    """Return the number of rejects of each kind, most frequent first."""
    counts = {entry["values"]: entry["counts"] for entry in pc.value_counts(index.column("status")).to_pylist()}
    counts.pop(OK, None)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def check_cap(index: Index, max_bad_fraction: float, listed: Path) -> None:
    """Raise `DataError` with the counts by kind if more than the allowed share, or everything, is bad."""
    counts, total = count_rejects(index), len(index)
    bad = sum(counts.values())
    if bad > max_bad_fraction * total:
        limit = f"more than max_bad_fraction={max_bad_fraction:g}"
    elif bad == total:
        limit = "no samples remain"
    else:
        return
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in counts.items())
    first = next(reason for reason in index.column("reason").to_pylist() if reason is not None)
    raise DataError(
        f"{bad:,} of {total:,} records are bad ({kinds}), {limit}: no index is written. "
        f"The first: {first}. Fix the records listed in {listed} or raise max_bad_fraction"
    )


def has_repaired_rejects(index: Index) -> bool:
    """Return whether an image that caused a reject has appeared or changed since the index was built."""
    made = index.path.stat().st_mtime_ns
    for batch in index.batches(["status", "image"]):
        for fault in batch.filter(pc.is_valid(batch["image"])).to_pylist():
            try:
                changed = Path(fault["image"]).stat().st_mtime_ns
            except OSError:
                continue  # still missing
            if fault["status"] == "missing_file" or changed > made:
                return True
    return False
