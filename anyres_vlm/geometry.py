"""AnyRes geometry: how an image is cut into tiles, and how many tokens result.

Everything follows from the image's size, in three steps:

1. Choose a canvas, a grid of tiles, from a list of candidates (`choose_canvas`).
2. Resize the image into the canvas, keeping its aspect ratio, and centre it with padding.
3. Encode a thumbnail of the whole image and each tile of the canvas into side x side tokens. Drop the rows and columns
   of tokens that lie in the padding, and append one `image_newline` token to each remaining row.

`plan_tiles` does all of this arithmetic and returns a `TilePlan`. Counting, packing, tiling, merging and export read
that plan, so they cannot disagree. The module is pure Python and imports neither torch nor numpy.

Sizes are (height, width). They are in pixels unless a name says tiles, rows or columns of tokens.

Two references exist, and they differ. `dialect="llava"` follows the any-resolution code of LLaVA-NeXT
(`llava/mm_utils.py`, `llava/model/llava_arch.py`); `dialect="hf"` follows `LlavaNextProcessor` and
`LlavaNextForConditionalGeneration` of transformers, which also serve the checkpoints of this package. Each dialect
reproduces its reference exactly. The differences are:

- The order of a pinpoint: (width, height) in `llava`, (height, width) in `hf`. With the released list, which holds each
  shape and its transpose, this changes which of two equally good canvases is tried first. Every image with both sides
  up to 336 pixels is such a tie: `llava` takes the portrait canvas, two tiles high, and `hf` the landscape one.
- The rounding of the kept rows and columns, in `_padding_tokens`. Where it matters, two rows or columns more are kept
  in one dialect than in the other.

For example, an image of 640 x 480 pixels (width x height) has 2340 tokens in both dialects: 576 of the thumbnail, 36 x
48 of a 2 x 2 grid and 36 newlines. One of 300 x 200 has 976 in `llava` and 1464 in `hf`; tests/unit/test_geometry.py
compares both dialects with the references.
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
_PAIR = r"\((\d{1,3})x(\d{1,3})\)"
TILE_RANGE = re.compile(rf"{_PAIR}[\d\s,.x()]*{_PAIR}")


@dataclass(frozen=True, slots=True)
class Size:
    """Height and width in pixels, both at least 1. Raises `UsageError` otherwise."""

    height: int
    width: int

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise UsageError(f"image size {self.width}x{self.height} (width x height): both sides must be at least 1")


@dataclass(frozen=True, slots=True)
class Grid:
    """Rows and columns of tiles."""

    rows: int
    cols: int

    @classmethod
    def parse(cls, text: str) -> Grid:
        """Parse `RxC`, rows first, as written on the command line and in configs. Raises `UsageError`."""
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
    """The settings of the geometry: candidate canvases, tile and patch side, token layout and dialect.

    `pinpoints` are the candidate canvases in pixels, in the order in which they are tried, as in a checkpoint's
    `image_grid_pinpoints`. A pair is (height, width) in dialect `hf` and (width, height) in `llava`; `canvases` returns
    them as sizes. Without pinpoints, an image is represented by its thumbnail only. `tile` and `patch` are sides in
    pixels. The defaults are those of the released LLaVA-NeXT checkpoints.

    Layout `spatial_unpad` drops the tokens of the padding and adds newlines; `flat` keeps all tokens of all tiles and
    adds none. Raises `UsageError` if the tile is not a multiple of the patch or a pinpoint not a multiple of the tile.
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
        """Derive the candidates from a largest grid of R x C tiles.

        They are all a x b tiles with 2 <= a*b <= R*C and max(a, b) <= max(R, C) + 1. So 2x2 gives the released set of
        LLaVA-NeXT, and 1x1 an empty list, the thumbnail only. Of two grids with the same number of tiles, the squarer
        one is tried first.
        """
        longest = max(grid.rows, grid.cols) + 1
        most = grid.rows * grid.cols
        pairs = [(a, b) for a in range(1, longest + 1) for b in range(1, longest + 1) if 2 <= a * b <= most]
        pairs.sort(key=lambda pair: (max(pair), pair[0] * pair[1], pair))
        return cls(tuple((a * tile, b * tile) for a, b in pairs), tile, patch, layout, dialect)

    @property
    def side(self) -> int:
        """Tokens along one side of a tile: one per patch (24 for CLIP ViT-L/14-336)."""
        return self.tile // self.patch

    @property
    def patches(self) -> int:
        """Tokens of one tile, side x side (576 for CLIP ViT-L/14-336)."""
        return self.side**2

    @cached_property
    def canvases(self) -> tuple[Size, ...]:
        """The candidate canvases in the order in which they are tried, as the dialect reads the pinpoints."""
        if self.dialect == "hf":
            return tuple(Size(height=a, width=b) for a, b in self.pinpoints)
        return tuple(Size(height=b, width=a) for a, b in self.pinpoints)


def expand_pinpoints(text: str, tile: int) -> tuple[tuple[int, int], ...]:
    """Expand a range of canvases in tiles, such as `(1x1),...,(6x6)`, to pinpoints in pixels.

    Only the first and the last pair count, and the second number varies fastest, as in LLaVA-NeXT. Raises `UsageError`
    for any other text.
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
class TilePlan:
    """Everything that follows from the size of an image. `plan_tiles` makes it.

    In pixels: `image`, `tile`, `resized` (the image on the canvas) and the padding above and to the left of it, `top`
    and `left`; where the total padding is odd, the extra pixel is at the bottom or right.

    In tokens: `side` along a tile, and the part of the (grid.rows * side, grid.cols * side) grid of tokens that the
    language model receives: `kept_rows` x `kept_cols` from row `kept_top` and column `kept_left` on.

    `grid` counts tiles. It is 0x0, and nothing is kept of it, if there is only the thumbnail.
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
        """The canvas in pixels; one tile if there is only the thumbnail."""
        return Size(height=max(self.grid.rows, 1) * self.tile, width=max(self.grid.cols, 1) * self.tile)

    @property
    def num_tiles(self) -> int:
        """Number of tiles to encode, T: the thumbnail and those of the grid."""
        return 1 + self.grid.rows * self.grid.cols

    @property
    def visual_tokens(self) -> int:
        """Number of tokens with image content: side x side of the thumbnail and the kept part of the grid."""
        return self.side**2 + self.kept_rows * self.kept_cols

    def tile_tokens(self, row: int, col: int) -> int:
        """Return the number of kept tokens of one tile of the grid; over all tiles they sum to the kept part."""
        rows = min(row * self.side + self.side, self.kept_top + self.kept_rows) - max(row * self.side, self.kept_top)
        cols = min(col * self.side + self.side, self.kept_left + self.kept_cols) - max(col * self.side, self.kept_left)
        return max(rows, 0) * max(cols, 0)

    @property
    def newline_tokens(self) -> int:
        """Number of learned `image_newline` tokens: one after each kept row in layout `spatial_unpad`, else none."""
        return self.kept_rows if self.layout == "spatial_unpad" else 0

    @property
    def total_tokens(self) -> int:
        """Number of positions of the image in the language model's sequence, N: visual and newline tokens."""
        return self.visual_tokens + self.newline_tokens


def plan_tiles(size: Size, tiling: Tiling) -> TilePlan:
    """Plan the tiles and tokens of an image. Takes a few microseconds."""
    canvas = choose_canvas(size, tiling)
    if canvas is None:
        thumbnail = Size(height=tiling.tile, width=tiling.tile)
        return TilePlan(size, tiling.tile, tiling.side, tiling.layout, Grid(0, 0), thumbnail, 0, 0, 0, 0, 0, 0)
    resized = _fit(size, canvas)
    grid = Grid(rows=canvas.height // tiling.tile, cols=canvas.width // tiling.tile)
    token_rows, token_cols = grid.rows * tiling.side, grid.cols * tiling.side
    cut_rows, cut_cols = 0, 0
    if tiling.layout == "spatial_unpad":
        cut_rows, cut_cols = _padding_tokens(size, token_rows, token_cols, tiling.dialect)
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


def choose_canvas(size: Size, tiling: Tiling) -> Size | None:
    """Return the canvas with the largest effective area, and of equal ones the least waste; None without candidates.

    The references replace the best candidate so far only by a strictly better one, so the first candidate wins a tie;
    `max` does the same. Ties are common: the effective area never exceeds the image's own, so it is equal for all
    canvases on which the image is not shrunk, and a shape and its transpose then waste the same area.
    """

    def merit(canvas: Size) -> tuple[int, int]:
        areas = canvas_areas(size, canvas)
        return areas.effective, -areas.waste

    return max(tiling.canvases, key=merit, default=None)


class CanvasAreas(NamedTuple):
    """The area of a canvas in pixels, in two parts."""

    effective: int  # pixels with information of the image: those it covers, at most as many as it has
    waste: int  # the rest: padding, and what enlarging the image adds


def canvas_areas(size: Size, canvas: Size) -> CanvasAreas:
    """Return the effective and the wasted area of an image of this size on a canvas.

    The sides are truncated to integers here and rounded up in `_fit`, as in both references.
    """
    scale = min(canvas.width / size.width, canvas.height / size.height)
    effective = min(int(size.width * scale) * int(size.height * scale), size.height * size.width)
    return CanvasAreas(effective, canvas.height * canvas.width - effective)


def _fit(size: Size, canvas: Size) -> Size:
    """Return the size of the image on the canvas: one side fits exactly, the other is rounded up."""
    scale_height, scale_width = canvas.height / size.height, canvas.width / size.width
    if scale_width < scale_height:
        return Size(height=min(math.ceil(size.height * scale_width), canvas.height), width=canvas.width)
    return Size(height=canvas.height, width=min(math.ceil(size.width * scale_height), canvas.width))


def _padding_tokens(size: Size, rows: int, cols: int, dialect: Dialect) -> tuple[int, int]:
    """Return the rows of padding tokens at the top, which equal those at the bottom, and the columns at the left.

    `rows` x `cols` is the whole grid of tokens. Only one axis is padded, so one of the two results is 0. The length of
    the image on the other axis is scaled to tokens and truncated, in `hf` after rounding to 7 decimals, so that 27 does
    not become 26 through floating-point error. Half of the rest, rounded down, is cut at each end.
    """
    if size.width / size.height > cols / rows:
        height = size.height * (cols / size.width)
        return (rows - (int(round(height, 7)) if dialect == "hf" else int(height))) // 2, 0
    width = size.width * (rows / size.height)
    return 0, (cols - (int(round(width, 7)) if dialect == "hf" else int(width))) // 2
