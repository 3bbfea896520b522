"""`anyres tokens`: what images cost, from their headers alone."""

from __future__ import annotations

import glob
import json
from pathlib import Path
from typing import Any

import typer

from anyres_vlm.data.blobs import is_sidecar
from anyres_vlm.data.headers import IMAGE_SUFFIXES, read_size
from anyres_vlm.data.tile_picture import (
    CANDIDATE_COLUMNS,
    candidate_rows,
    describe_plan,
    explain_choice,
    format_histogram,
    format_table,
)
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.geometry import Dialect, Grid, Layout, Size, Tiling, plan_tiles

COLUMNS = ("image", "size", "grid", "tiles", "visual", "newline", "tokens")


def tokens(
    images: list[str] = typer.Argument(..., help="Image files, folders or quoted globs."),
    grid: str = typer.Option("2x2", help="Largest grid of tiles, ROWSxCOLUMNS; 1x1 is the thumbnail alone."),
    layout: Layout = typer.Option("spatial_unpad", help="spatial_unpad or flat."),
    dialect: Dialect = typer.Option("hf", help="hf as transformers counts, llava as the original code does."),
    tile: int = typer.Option(336, help="Tile side in pixels."),
    patch: int = typer.Option(14, help="Patch side in pixels."),
    as_json: bool = typer.Option(False, "--json", help="Print a JSON list with one object an image."),
    draw: Path | None = typer.Option(None, help="Write a PNG of one image's tiles."),
) -> None:
    """Count the tiles and tokens of images without decoding a pixel.

    Of one image it shows all candidate canvases, of several a table and a histogram. Sizes are width x height.

    Example: anyres tokens photo.jpg --grid 3x3 --draw tiles.png
    """
    tiling = Tiling.from_grid(Grid.parse(grid), tile=tile, patch=patch, layout=layout, dialect=dialect)
    paths = _find(images)
    rows = [_row(path, tiling) for path in paths]
    if draw is not None:
        _draw(paths, tiling, draw)
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        _print(rows, tiling)
    if any("error" in row for row in rows):
        raise typer.Exit(1)


def _find(names: list[str]) -> list[Path]:
    """Return files as given, images below folders, matches of globs; sorted inside each, sidecars left out."""
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
        # Nothing found there: its row says so.
        found += [match for match in matches if match == path or not is_sidecar(str(match))] or [path]
    return found


def _row(path: Path, tiling: Tiling) -> dict[str, Any]:
    """What `--json` prints of an image."""
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
    """One image with its candidates, or a table of several and a histogram."""
    good = [row for row in rows if "error" not in row]
    for row in rows:
        if "error" in row:
            typer.echo(f"error: {row['error']}", err=True)
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
    from anyres_vlm.data.images import open_image
    from anyres_vlm.data.tile_picture import draw_tiling

    draw_tiling(open_image(paths[0]), tiling).save(target, format="PNG")
