"""`anyres tokens`: what images cost, from their headers alone."""

from __future__ import annotations

import glob
import json
from pathlib import Path
from typing import Any

import typer

from anyres_vlm.data.headers import IMAGE_SUFFIXES, read_size
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.geometry import Dialect, Grid, Layout, Tiling, plan_tiles


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

    Example: anyres tokens photo.jpg --grid 3x3
    """
    tiling = Tiling.from_grid(Grid.parse(grid), tile=tile, patch=patch, layout=layout, dialect=dialect)
    paths = _find(images)
    rows = [_row(path, tiling) for path in paths]
    if draw is not None:
        _draw(paths, tiling, draw)
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        _print(rows)
    if any("error" in row for row in rows):
        raise typer.Exit(1)


def _find(names: list[str]) -> list[Path]:
    """Files as given, images below folders, matches of globs; sorted inside each."""
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
        found += matches or [path]  # nothing found there: its row says so
    return found


def _row(path: Path, tiling: Tiling) -> dict[str, Any]:
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


def _print(rows: list[dict[str, Any]]) -> None:
    good = [row for row in rows if "error" not in row]
    for row in rows:
        if "error" in row:
            typer.echo(f"error: {row['error']}", err=True)
            continue
        print(
            f"{row['path']}: {row['width']}x{row['height']} -> {row['grid'][0]}x{row['grid'][1]} grid, "
            f"{row['tiles']} tiles, {row['visual_tokens']:,} visual + {row['newline_tokens']} newline = "
            f"{row['total']:,} tokens"
        )
    total = sum(row["total"] for row in good)
    print(
        f"{len(good)} image{'' if len(good) == 1 else 's'}: {sum(row['tiles'] for row in good)} tiles, {total:,} tokens"
    )


def _draw(paths: list[Path], tiling: Tiling, target: Path) -> None:
    if len(paths) != 1:
        raise UsageError(f"--draw draws one image, got {len(paths)}: name a single file")
    from anyres_vlm.data.images import open_image  # start-up time: only this option draws
    from anyres_vlm.serve.tiling_picture import draw_tiling

    draw_tiling(open_image(paths[0]), tiling).save(target, format="PNG")
