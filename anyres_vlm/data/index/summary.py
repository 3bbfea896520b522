"""Totals of an index."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow.compute as pc

from anyres_vlm.data.index.rejects import count_rejects, rejects_path
from anyres_vlm.data.index.table import Index


def summarise(index: Index) -> dict[str, Any]:
    """Return totals over the good samples and the rejects by kind, as JSON values."""
    tokens = index.tokens[index.ok]
    spread = np.percentile(tokens, [50, 95]) if len(tokens) else np.zeros(2)
    return {
        "samples": len(index),
        "ok": len(tokens),
        "rejects": count_rejects(index),
        "changes": index.changes,
        "tokens": {
            "total": int(tokens.sum()),
            "mean": round(float(tokens.mean()), 2) if len(tokens) else 0.0,
            "median": float(spread[0]),
            "p95": float(spread[1]),
            "max": int(tokens.max(initial=0)),
        },
        "visual_tokens": _total(index, "visual_tokens"),
        "newline_tokens": _total(index, "newline_tokens"),
        "text_tokens": _total(index, "text_tokens"),
        "supervised": _total(index, "supervised"),
        "tiles": _total(index, "tiles"),
        "images": int(num_images(index)[index.ok].sum()),
        "key": index.key,
        "index": str(index.path),
        "rejects_file": str(rejects_path(index.path)),
    }


def num_images(index: Index) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return the number of images with a readable header in each row."""
    counts: np.ndarray[tuple[int], np.dtype[np.int64]] = (
        pc.list_value_length(index.column("heights")).to_numpy().astype(np.int64)
    )
    return counts


def _total(index: Index, column: str) -> int:
    return int(index.numbers(column)[index.ok].sum())
