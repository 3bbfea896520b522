"""`anyres tokens`: count tiles and tokens of images from their headers."""

from __future__ import annotations

from pathlib import Path

import typer

from anyres_vlm.cli.options import DIALECT, GRID_HELP, LAYOUT
from anyres_vlm.data.tile_picture import print_counts
from anyres_vlm.geometry import Dialect, Grid, Layout, Tiling


def tokens(
    images: list[str] = typer.Argument(..., help="Image files, folders or quoted globs."),
    grid: str = typer.Option("2x2", help=GRID_HELP),
    layout: Layout = typer.Option("spatial_unpad", help=LAYOUT.help),
    dialect: Dialect = typer.Option("hf", help=DIALECT.help),
    tile: int = typer.Option(336, help="Tile side in pixels."),
    patch: int = typer.Option(14, help="Patch side in pixels."),
    as_json: bool = typer.Option(False, "--json", help="Print a JSON list with one object per image."),
    draw: Path | None = typer.Option(None, help="PNG file for a picture of one image's tiles."),
) -> None:
    """Count the tiles and tokens of images without decoding their pixels.

    Prints all candidate canvases of a single image, or a table and a histogram. Sizes are width x height.

    Example: anyres tokens photo.jpg --grid 3x3 --draw tiles.png
    """
    tiling = Tiling.from_grid(Grid.parse(grid), tile=tile, patch=patch, layout=layout, dialect=dialect)
    if not print_counts(images, tiling, as_json, draw):
        raise typer.Exit(1)
