"""Count the tiles and tokens of image files and print them, for `anyres tokens` and `tools/count_tokens.py`.

The latter starts in a fraction of a second, so nothing slow is imported here.
"""

from __future__ import annotations

import glob
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anyres_vlm.data.blobs import is_sidecar
from anyres_vlm.data.headers import IMAGE_SUFFIXES, read_size
from anyres_vlm.data.tile_picture import (
    CANDIDATE_COLUMNS,
    candidate_rows,
    describe_plan,
    draw_tiling,
    explain_choice,
    format_histogram,
    format_table,
)
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.geometry import Size, Tiling, plan_tiles

COLUMNS = ("image", "size", "grid", "tiles", "visual", "newline", "tokens")


def print_counts(images: Sequence[str], tiling: Tiling, as_json: bool, draw: Path | None) -> bool:
    """Print the counts of image files, folders or globs; return whether all images could be read.

    `draw` is the PNG file to write the tiles of a single image to. Raises `UsageError` if there are several.
    """
    paths = _find(images)
    rows = [_row(path, tiling) for path in paths]
    if draw is not None:
        _draw(paths, tiling, draw)
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        _print(rows, tiling)
    return not any("error" in row for row in rows)


def _find(names: Sequence[str]) -> list[Path]:
    """Return files as given, images in folders and matches of globs; each sorted, without sidecars."""
    found: list[Path] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            matches = sorted(
                file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()
            )
        elif glob.has_magic(name) and not path.exists():
            matches = sorted(Path(match) for match in glob.glob(name, recursive=True) if Path(match).is_file())
        else:
            matches = [path]
        # If nothing is found, the name itself stays, so that its row reports an error.
        found += [match for match in matches if match == path or not is_sidecar(str(match))] or [path]
    return found


def _row(path: Path, tiling: Tiling) -> dict[str, Any]:
    """Return what `--json` prints for an image."""
    try:
        size = read_size(path)
    except DataError as error:
        return {"path": str(path), "error": str(error)}
    plan = plan_tiles(size, tiling)
    return {
        "path": str(path),
        "width": size.width,
        "height": size.height,
        "canvas": [plan.canvas.width, plan.canvas.height],
        "grid": [max(plan.grid.rows, 1), max(plan.grid.cols, 1)],
        "tiles": plan.num_tiles,
        "visual_tokens": plan.visual_tokens,
        "newline_tokens": plan.newline_tokens,
        "total": plan.total_tokens,
    }


def _print(rows: list[dict[str, Any]], tiling: Tiling) -> None:
    """Print one image with its candidate canvases, or a table of several and a histogram."""
    good = [row for row in rows if "error" not in row]
    for row in rows:
        if "error" in row:
            print(f"error: {row['error']}", file=sys.stderr)
    if len(rows) == len(good) == 1:
        (row,) = good
        size = Size(height=row["height"], width=row["width"])
        print(f"{row['path']}: {describe_plan(plan_tiles(size, tiling))}")
        if tiling.canvases:
            print(f"\n{format_table(CANDIDATE_COLUMNS, candidate_rows(size, tiling))}")
        print(explain_choice(size, tiling))
        return
    totals = [row["total"] for row in good]
    if good:
        print(format_table(COLUMNS, [_cells(row) for row in good]))
    if len(good) > 1:
        print(f"\nimages by tokens\n{format_histogram(totals)}\n")
    print(
        f"{len(good)} image{'' if len(good) == 1 else 's'}: {sum(row['tiles'] for row in good)} tiles, "
        f"{sum(totals):,} tokens"
    )


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    counts = (f"{row[name]:,}" for name in ("tiles", "visual_tokens", "newline_tokens", "total"))
    return (row["path"], f"{row['width']}x{row['height']}", "x".join(map(str, row["grid"])), *counts)


def _draw(paths: list[Path], tiling: Tiling, target: Path) -> None:
    if len(paths) != 1:
        raise UsageError(f"--draw draws one image, got {len(paths)}: name a single file")
    from anyres_vlm.data.images import open_image  # start-up time: imports numpy

    draw_tiling(open_image(paths[0]), tiling).save(target, format="PNG")
