"""AnyRes geometry: the tiles of an image and the number of their tokens, in pure Python.

Counting, packing, tiling, merging and export all use the same `TilePlan`. Sizes are (height, width) in pixels. The
references are the any-resolution code of LLaVA-NeXT (`dialect="llava"`) and `LlavaNextProcessor` of transformers
(`dialect="hf"`); where they disagree, each dialect follows its reference exactly.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from anyres_vlm.errors import UsageError

Layout = Literal["spatial_unpad", "flat"]
Dialect = Literal["hf", "llava"]

GRID_LIMIT = 12  # tiles per side; 12 x 12 tiles of 576 tokens are 83k tokens


@dataclass(frozen=True, slots=True)
class Size:
    """Height and width in pixels."""

    height: int
    width: int

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise UsageError(f"image size {self.width}x{self.height} (width x height): both sides must be at least 1")


_PAIR = r"\((\d{1,3})x(\d{1,3})\)"
TILE_RANGE = re.compile(rf"{_PAIR}[\d\s,.x()]*{_PAIR}")


def expand_pinpoints(text: str, tile: int) -> tuple[tuple[int, int], ...]:
    """Read a range of canvases in tiles, `(1x1),...,(6x6)`, as pinpoints in pixels, in LLaVA-NeXT's order.

    The first and the last pair count, as in LLaVA-NeXT. Raises `UsageError` for any other text.
    """
    match = TILE_RANGE.fullmatch(text.strip())
    first, second, first_end, second_end = map(int, match.groups()) if match else (0, 0, 0, 0)
    if not (1 <= first <= first_end <= GRID_LIMIT and 1 <= second <= second_end <= GRID_LIMIT):
        raise UsageError(
            f"pinpoints {text!r}: expected pairs of pixels, or a range of tiles such as (1x1),...,(6x6), at most "
            f"{GRID_LIMIT} a side"
        )
    return tuple((a * tile, b * tile) for a in range(first, first_end + 1) for b in range(second, second_end + 1))


@dataclass(frozen=True, slots=True)
class Grid:
    """Rows and columns of tiles."""

    rows: int
    cols: int

    @classmethod
    def parse(cls, text: str) -> Grid:
        """Parse `RxC`, rows first, as written on the command line and in configs."""
        match = re.fullmatch(r"(\d+)x(\d+)", text.strip().lower())
        if match is None:
            raise UsageError(f"grid {text!r}: expected ROWSxCOLUMNS such as 2x2, or 1x1 for the thumbnail only")
        rows, cols = int(match[1]), int(match[2])
        if not (1 <= rows <= GRID_LIMIT and 1 <= cols <= GRID_LIMIT):
            raise UsageError(f"grid {text!r}: rows and columns must be from 1 to {GRID_LIMIT}")
        return cls(rows=rows, cols=cols)

    def __str__(self) -> str:
        return f"{self.rows}x{self.cols}"


@dataclass(frozen=True)
class Tiling:
    """How images are tiled: candidate canvases, tile and patch side in pixels, token layout and dialect.

    `pinpoints` are pairs of pixels in the order in which they are tried, as in a checkpoint's `image_grid_pinpoints`.
    A pair is (height, width) in dialect `hf` and (width, height) in `llava`. With an empty list, an image becomes its
    thumbnail only.
    """

    pinpoints: tuple[tuple[int, int], ...] = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
    tile: int = 336
    patch: int = 14
    layout: Layout = "spatial_unpad"
    dialect: Dialect = "hf"

    def __post_init__(self) -> None:
        if self.patch < 1 or self.tile < self.patch or self.tile % self.patch:
            raise UsageError(f"tile side {self.tile} must be a positive multiple of the patch side {self.patch}")
        for pair in self.pinpoints:
            if len(pair) != 2 or min(pair) < self.tile or any(side % self.tile for side in pair):
                raise UsageError(
                    f"pinpoint {list(pair)}: both sides must be positive multiples of the tile side {self.tile}"
                )

    @classmethod
    def from_grid(
        cls,
        grid: Grid,
        *,
        tile: int = 336,
        patch: int = 14,
        layout: Layout = "spatial_unpad",
        dialect: Dialect = "hf",
    ) -> Tiling:
        """Use all a x b tiles with 2 <= a*b <= R*C and max(a, b) <= max(R, C) + 1, small first; none for 1x1."""
        longest = max(grid.rows, grid.cols) + 1
        most = grid.rows * grid.cols
        pairs = [(a, b) for a in range(1, longest + 1) for b in range(1, longest + 1) if 2 <= a * b <= most]
        pairs.sort(key=lambda pair: (max(pair), pair[0] * pair[1], pair))
        return cls(tuple((a * tile, b * tile) for a, b in pairs), tile, patch, layout, dialect)

    @property
    def side(self) -> int:
        """Patches along one side of a tile."""
        return self.tile // self.patch

    @property
    def patches(self) -> int:
        """Tokens of one tile (576 for CLIP ViT-L/14-336)."""
        return self.side**2

    @cached_property
    def canvases(self) -> tuple[Size, ...]:
        """The candidate canvases in the order in which they are tried; the first of equals wins."""
        if self.dialect == "hf":
            return tuple(Size(height=a, width=b) for a, b in self.pinpoints)
        return tuple(Size(height=b, width=a) for a, b in self.pinpoints)


@dataclass(frozen=True, slots=True)
class TilePlan:
    """Everything that follows from the size of an image.

    `grid` is 0x0 for the thumbnail only. `resized` is the image's size on the canvas; `top` and `left` are the padding
    in pixels. `kept_*` is the part of the (rows * side, cols * side) grid of tokens that the model receives.
    """

    image: Size
    tile: int
    side: int
    layout: Layout
    grid: Grid
    resized: Size
    top: int
    left: int
    kept_top: int
    kept_left: int
    kept_rows: int
    kept_cols: int

    @property
    def canvas(self) -> Size:
        """The canvas in pixels; one tile for the thumbnail only."""
        return Size(height=max(self.grid.rows, 1) * self.tile, width=max(self.grid.cols, 1) * self.tile)

    @property
    def num_tiles(self) -> int:
        """Number of tiles for the encoder, thumbnail included."""
        return 1 + self.grid.rows * self.grid.cols

    @property
    def visual_tokens(self) -> int:
        """Number of tokens with image content: those of the thumbnail and the kept part of the grid."""
        return self.side**2 + self.kept_rows * self.kept_cols

    def tile_tokens(self, row: int, col: int) -> int:
        """Return the kept tokens of one grid tile; they sum to `kept_rows * kept_cols`."""
        rows = min(row * self.side + self.side, self.kept_top + self.kept_rows) - max(row * self.side, self.kept_top)
        cols = min(col * self.side + self.side, self.kept_left + self.kept_cols) - max(col * self.side, self.kept_left)
        return max(rows, 0) * max(cols, 0)

    @property
    def newline_tokens(self) -> int:
        """Number of learned `image_newline` tokens: one after every kept row in layout `spatial_unpad`."""
        return self.kept_rows if self.layout == "spatial_unpad" else 0

    @property
    def total_tokens(self) -> int:
        """Number of positions of the image in the language model's sequence."""
        return self.visual_tokens + self.newline_tokens


class CanvasAreas(NamedTuple):
    """Pixels of a canvas: those that carry original image pixels, and the rest (enlargement and padding)."""

    effective: int
    waste: int


def canvas_areas(size: Size, canvas: Size) -> CanvasAreas:
    """Return the effective and the wasted area of an image of this size on a canvas."""
    scale = min(canvas.width / size.width, canvas.height / size.height)
    effective = min(int(size.width * scale) * int(size.height * scale), size.height * size.width)
    return CanvasAreas(effective, canvas.height * canvas.width - effective)


def choose_canvas(size: Size, tiling: Tiling) -> Size | None:
    """Return the canvas with the largest effective area, then the least waste; None without candidates."""

    def merit(canvas: Size) -> tuple[int, int]:
        areas = canvas_areas(size, canvas)
        return areas.effective, -areas.waste

    return max(tiling.canvases, key=merit, default=None)


def plan_tiles(size: Size, tiling: Tiling) -> TilePlan:
    """Plan an image: canvas, resized size, padding and kept tokens. Takes a few microseconds."""
    canvas = choose_canvas(size, tiling)
    if canvas is None:
        thumbnail = Size(height=tiling.tile, width=tiling.tile)
        return TilePlan(size, tiling.tile, tiling.side, tiling.layout, Grid(0, 0), thumbnail, 0, 0, 0, 0, 0, 0)
    resized = _fit(size, canvas)
    grid = Grid(rows=canvas.height // tiling.tile, cols=canvas.width // tiling.tile)
    token_rows, token_cols = grid.rows * tiling.side, grid.cols * tiling.side
    cut_rows, cut_cols = 0, 0
    if tiling.layout == "spatial_unpad":
        cut_rows, cut_cols = _unpad(size, token_rows, token_cols, tiling.dialect)
    return TilePlan(
        image=size,
        tile=tiling.tile,
        side=tiling.side,
        layout=tiling.layout,
        grid=grid,
        resized=resized,
        top=(canvas.height - resized.height) // 2,
        left=(canvas.width - resized.width) // 2,
        kept_top=cut_rows,
        kept_left=cut_cols,
        kept_rows=token_rows - 2 * cut_rows,
        kept_cols=token_cols - 2 * cut_cols,
    )


def count_tokens(size: Size, tiling: Tiling) -> int:
    """Return the number of positions of an image in the language model's sequence, newlines included."""
    return plan_tiles(size, tiling).total_tokens


def _fit(size: Size, canvas: Size) -> Size:
    """Scale a size into the canvas: one side fits exactly, the other is rounded up."""
    scale_height, scale_width = canvas.height / size.height, canvas.width / size.width
    if scale_width < scale_height:
        return Size(height=min(math.ceil(size.height * scale_width), canvas.height), width=canvas.width)
    return Size(height=canvas.height, width=min(math.ceil(size.width * scale_height), canvas.width))


def _unpad(size: Size, rows: int, cols: int, dialect: Dialect) -> tuple[int, int]:
    """Return token rows to cut at top and bottom each, and columns at left and right each; one of them is 0."""
    if size.width / size.height > cols / rows:
        height = size.height * (cols / size.width)
        return (rows - (int(round(height, 7)) if dialect == "hf" else int(height))) // 2, 0
    width = size.width * (rows / size.height)
    return 0, (cols - (int(round(width, 7)) if dialect == "hf" else int(width))) // 2
