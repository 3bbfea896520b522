"""Show how images are tiled and how many tokens they have: as text, as tables and as a picture.

`tools/count_tokens.py` starts in a fraction of a second, so nothing slow is imported here.
"""

from __future__ import annotations

import glob
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from anyres_vlm.data.blobs import is_sidecar
from anyres_vlm.data.headers import IMAGE_SUFFIXES, read_size
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.geometry import Size, TilePlan, Tiling, canvas_areas, choose_canvas, plan_tiles

WIDTH = 560  # longer side of the drawn canvas in pixels
GAP = 24  # between the parts of the picture, in pixels
PAPER, TEXT = (255, 255, 255), (30, 30, 34)
TILE_EDGE, KEPT_EDGE, NEWLINE, PADDING = (230, 70, 40), (30, 150, 70), (40, 90, 220), (205, 205, 210)
COLUMNS = ("image", "size", "grid", "tiles", "visual", "newline", "tokens")
CANDIDATE_COLUMNS = ("canvas", "grid", "effective px", "of the image", "wasted px", "of the canvas", "")
BINS = 12  # largest number of bars of a histogram
BAR = 40  # characters of the longest bar


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


def describe_plan(plan: TilePlan) -> str:
    """Return size, grid and token counts of an image in one line."""
    return (
        f"{plan.image.width}x{plan.image.height} -> {max(plan.grid.rows, 1)}x{max(plan.grid.cols, 1)} grid, "
        f"{plan.num_tiles} tile{'s'[: plan.num_tiles > 1]}, {plan.visual_tokens:,} visual + "
        f"{plan.newline_tokens} newline = {plan.total_tokens:,} tokens"
    )


def explain_choice(size: Size, tiling: Tiling) -> str:
    """Return in one sentence why the canvas was chosen."""
    chosen = choose_canvas(size, tiling)
    if chosen is None:
        return "There is no candidate canvas: only the thumbnail is used."
    best = canvas_areas(size, chosen)
    areas = [canvas_areas(size, canvas) for canvas in tiling.canvases]
    name = f"{chosen.width}x{chosen.height}"
    if len(areas) == 1:
        return f"{name} is the only candidate."
    if (equals := areas.count(best)) > 1:
        return f"{name} is the first in dialect {tiling.dialect} of {equals} equally good candidates."
    if (rivals := sum(other.effective == best.effective for other in areas)) > 1:
        return f"{name} wastes the least area of the {rivals} candidates that keep most of the image."
    return f"{name} keeps most of the image."


def candidate_rows(size: Size, tiling: Tiling) -> list[tuple[str, ...]]:
    """Return one row per candidate canvas, in the order in which they are tried, for `CANDIDATE_COLUMNS`.

    The last column marks the chosen one. Sizes are written width x height, grids rows x columns.
    """
    rows: list[tuple[str, ...]] = []
    chosen = choose_canvas(size, tiling)
    for canvas in tiling.canvases:
        effective, waste = canvas_areas(size, canvas)
        rows.append(
            (
                f"{canvas.width}x{canvas.height}",
                f"{canvas.height // tiling.tile}x{canvas.width // tiling.tile}",
                f"{effective:,}",
                f"{effective / (size.height * size.width):.1%}",
                f"{waste:,}",
                f"{waste / (canvas.height * canvas.width):.1%}",
                "chosen" if canvas == chosen else "",
            )
        )
    return rows


def format_table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align columns of text, the first one to the left and the others to the right."""
    lines = [names, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def format_histogram(values: Sequence[int]) -> str:
    """Return a text histogram with a line (range, count, bar) per value, or per bin of equal width for many values."""
    low, width = min(values), max(-(-(max(values) - min(values) + 1) // BINS), 1)
    distinct = sorted(set(values))
    if len(distinct) <= BINS:
        ranges = [(value, value) for value in distinct]
    else:
        ranges = [(start, start + width - 1) for start in range(low, max(values) + 1, width)]
    counts = [sum(first <= value <= last for value in values) for first, last in ranges]
    names = [f"{first:,}" if first == last else f"{first:,} to {last:,}" for first, last in ranges]
    bars = ["#" * -(-count * BAR // max(counts)) for count in counts]
    widths = len(max(names, key=len)), len(f"{max(counts):,}")
    rows = zip(names, counts, bars, strict=True)
    return "\n".join(f"{name:>{widths[0]}}  {count:>{widths[1]},}  {bar}".rstrip() for name, count, bar in rows)


def draw_tiling(image: Image.Image, tiling: Tiling) -> Image.Image:
    """Draw the thumbnail, the canvas to the right of it, and a legend with the counts below. RGB in, RGB out."""
    plan = plan_tiles(Size(height=image.height, width=image.width), tiling)
    canvas = _canvas(image, plan)
    has_grid = plan.num_tiles > 1
    thumb_side = WIDTH * plan.tile // max(plan.canvas.height, plan.canvas.width) if has_grid else WIDTH // 2
    thumbnail = image.resize((thumb_side, thumb_side), Image.Resampling.BICUBIC)
    lines = _legend(plan, tiling)
    letters = ImageFont.load_default(15)
    text_width = max(int(letters.getlength(line)) for line, _ in lines)
    width = thumb_side + (GAP + canvas.width + 14 if has_grid else 0)
    height = max(thumb_side, canvas.height if has_grid else 0)
    sheet = Image.new("RGB", (max(width, text_width) + 2 * GAP, height + 2 * GAP + 22 * len(lines) + GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    sheet.paste(thumbnail, (GAP, GAP))
    pen.rectangle((GAP, GAP, GAP + thumb_side - 1, GAP + thumb_side - 1), outline=TILE_EDGE, width=2)
    _count(pen, GAP, GAP, plan.side**2)
    if has_grid:
        left = GAP + thumb_side + GAP
        sheet.paste(canvas, (left, GAP))
        _mark_newlines(pen, plan, canvas, left)
    for index, (line, colour) in enumerate(lines):
        pen.text((GAP, height + 2 * GAP + 22 * index), line, font=letters, fill=colour)
    return sheet


def _canvas(image: Image.Image, plan: TilePlan) -> Image.Image:
    """Draw the resized image on a hatched canvas, with the edges of the tiles and of the kept tokens."""
    scale = WIDTH / max(plan.canvas.height, plan.canvas.width)
    drawn = Image.new("RGB", (round(plan.canvas.width * scale), round(plan.canvas.height * scale)), (238, 238, 240))
    pen = ImageDraw.Draw(drawn)
    for offset in range(-drawn.height, drawn.width, 10):
        pen.line((offset, drawn.height, offset + drawn.height, 0), fill=PADDING)
    size = max(round(plan.resized.width * scale), 1), max(round(plan.resized.height * scale), 1)
    drawn.paste(image.resize(size, Image.Resampling.BICUBIC), (round(plan.left * scale), round(plan.top * scale)))
    for row in range(plan.grid.rows):
        for col in range(plan.grid.cols):
            box = _box(col * plan.tile, row * plan.tile, plan.tile, plan.tile, scale)
            pen.rectangle(box, outline=TILE_EDGE, width=2)
    if plan.kept_rows and plan.kept_cols:
        token = plan.tile / plan.side
        kept = (plan.kept_left * token, plan.kept_top * token, plan.kept_cols * token, plan.kept_rows * token)
        pen.rectangle(_box(*kept, scale), outline=KEPT_EDGE, width=3)
    for row in range(plan.grid.rows):
        for col in range(plan.grid.cols):
            left, top, *_ = _box(col * plan.tile, row * plan.tile, plan.tile, plan.tile, scale)
            _count(pen, left, top, plan.tile_tokens(row, col))
    return drawn


def _box(left: float, top: float, width: float, height: float, scale: float) -> tuple[int, int, int, int]:
    return round(left * scale), round(top * scale), round((left + width) * scale) - 1, round((top + height) * scale) - 1


def _count(pen: ImageDraw.ImageDraw, left: int, top: int, tokens: int) -> None:
    """Write the number of tokens of a tile into its corner."""
    letters = ImageFont.load_default(13)
    corner = left + 8, top + 6
    x0, y0, x1, y1 = pen.textbbox(corner, str(tokens), font=letters)
    pen.rectangle((x0 - 3, y0 - 3, x1 + 3, y1 + 3), fill=PAPER)
    pen.text(corner, str(tokens), font=letters, fill=TEXT)


def _mark_newlines(pen: ImageDraw.ImageDraw, plan: TilePlan, canvas: Image.Image, left: int) -> None:
    """Draw a tick at the end of each kept row, where a newline token follows."""
    pitch = canvas.height / (plan.grid.rows * plan.side)
    x = left + (plan.kept_left + plan.kept_cols) * pitch
    for row in range(plan.newline_tokens):
        y = GAP + (plan.kept_top + row + 0.5) * pitch
        pen.line((x + 3, y, x + 10, y), fill=NEWLINE, width=2)


def _legend(plan: TilePlan, tiling: Tiling) -> list[tuple[str, tuple[int, int, int]]]:
    grid = f"{plan.grid.rows} rows x {plan.grid.cols} columns" if plan.num_tiles > 1 else "the thumbnail only"
    size = f"{plan.image.width} x {plan.image.height} px"
    lines = [
        (f"{size} -> {grid} of {plan.tile} px tiles, dialect {tiling.dialect}, layout {plan.layout}", TEXT),
        (f"{plan.num_tiles} tiles with the thumbnail = {plan.num_tiles * plan.side**2:,} patches encoded", TILE_EDGE),
    ]
    if plan.num_tiles > 1:
        rows, cols = plan.kept_rows, plan.kept_cols
        lines.append(
            (f"{rows} x {cols} tokens kept of the grid + {plan.side**2} of the thumbnail (see corners)", KEPT_EDGE)
        )
    if plan.newline_tokens:
        lines.append((f"{plan.newline_tokens} newline tokens, one at the end of each row", NEWLINE))
    total = f"{plan.visual_tokens:,} visual + {plan.newline_tokens} newline = {plan.total_tokens:,} tokens"
    return [*lines, (f"{total} in the language model", TEXT)]
