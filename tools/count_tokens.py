#!/usr/bin/env python3
"""Count the tiles and visual tokens of images from their headers: `anyres tokens`, straight from a clone.

The options are the same. They are parsed by argparse, because importing typer takes longer than counting.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from anyres_vlm.data.tile_picture import print_counts
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.geometry import Dialect, Grid, Layout, Tiling


def main() -> int:
    """Print the counts. Returns 0, or 2 for wrong options, 1 for images that cannot be read."""
    parser = argparse.ArgumentParser(description="Count the tiles and tokens of images without decoding a pixel.")
    parser.add_argument("images", nargs="+", help="Image files, folders or quoted globs.")
    parser.add_argument("--grid", default="2x2", help="Largest grid of tiles, ROWSxCOLUMNS; 1x1 is only the thumbnail.")
    parser.add_argument("--layout", default="spatial_unpad", choices=get_args(Layout))
    parser.add_argument("--dialect", default="hf", choices=get_args(Dialect), help="Whose token counts to reproduce.")
    parser.add_argument("--tile", type=int, default=336, help="Tile side in pixels.")
    parser.add_argument("--patch", type=int, default=14, help="Patch side in pixels.")
    parser.add_argument("--json", action="store_true", help="Print a JSON list with one object per image.")
    parser.add_argument("--draw", type=Path, help="Write a PNG of one image's tiles.")
    given = parser.parse_args()
    try:
        grid = Grid.parse(given.grid)
        tiling = Tiling.from_grid(grid, tile=given.tile, patch=given.patch, layout=given.layout, dialect=given.dialect)
        return 0 if print_counts(given.images, tiling, given.json, given.draw) else 1
    except (UsageError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


if __name__ == "__main__":
    sys.exit(main())
