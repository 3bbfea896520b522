"""A picture of what AnyRes does to an image: canvas, tiles, padding, kept tokens and row ends."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFont

from anyres_vlm.geometry import Size, TilePlan, Tiling, plan_tiles

PAPER, TEXT = (255, 255, 255), (30, 30, 34)
TILE_EDGE, KEPT_EDGE, NEWLINE, PADDING = (230, 70, 40), (30, 150, 70), (40, 90, 220), (205, 205, 210)
WIDTH = 560  # pixels of the drawn canvas' longer side
GAP = 24


def draw_tiling(image: Image.Image, tiling: Tiling) -> Image.Image:
    """Thumbnail at the left, the canvas beside it, a legend with the counts below. RGB in, RGB out."""
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
    """The resized image on its hatched canvas, with the tiles' and the kept tokens' edges."""
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
    """A tile's tokens in its corner."""
    letters = ImageFont.load_default(13)
    corner = left + 8, top + 6
    x0, y0, x1, y1 = pen.textbbox(corner, str(tokens), font=letters)
    pen.rectangle((x0 - 3, y0 - 3, x1 + 3, y1 + 3), fill=PAPER)
    pen.text(corner, str(tokens), font=letters, fill=TEXT)


def _mark_newlines(pen: ImageDraw.ImageDraw, plan: TilePlan, canvas: Image.Image, left: int) -> None:
    """A tick at the end of every kept row: there the model reads a newline."""
    pitch = canvas.height / (plan.grid.rows * plan.side)
    x = left + (plan.kept_left + plan.kept_cols) * pitch
    for row in range(plan.newline_tokens):
        y = GAP + (plan.kept_top + row + 0.5) * pitch
        pen.line((x + 3, y, x + 10, y), fill=NEWLINE, width=2)


def _legend(plan: TilePlan, tiling: Tiling) -> list[tuple[str, tuple[int, int, int]]]:
    grid = f"{plan.grid.rows} rows x {plan.grid.cols} columns" if plan.num_tiles > 1 else "the thumbnail alone"
    size = f"{plan.image.width} x {plan.image.height} px"
    lines = [
        (f"{size} -> {grid} of {plan.tile} px tiles, dialect {tiling.dialect}, layout {plan.layout}", TEXT),
        (f"{plan.num_tiles} tiles with the thumbnail = {plan.num_tiles * plan.side**2:,} patches encoded", TILE_EDGE),
    ]
    if plan.num_tiles > 1:
        rows, cols = plan.kept_rows, plan.kept_cols
        lines.append(
            (f"{rows} x {cols} tokens kept of the grid + {plan.side**2} of the thumbnail: in the corners", KEPT_EDGE)
        )
    if plan.newline_tokens:
        lines.append((f"{plan.newline_tokens} newline tokens, one at the end of each row", NEWLINE))
    total = f"{plan.visual_tokens:,} visual + {plan.newline_tokens} newline = {plan.total_tokens:,} tokens"
    return [*lines, (f"{total} in the language model", TEXT)]
