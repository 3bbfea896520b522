"""Token counts compared with fixed vectors, transformers, the reference formulas and brute force."""

from __future__ import annotations

import itertools
import math
import random
import time
import timeit
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, strategies as st
from transformers.image_processing_utils import get_patch_output_size
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

from anyres_vlm.errors import UsageError
from anyres_vlm.geometry import Dialect, Grid, Size, Tiling, canvas_areas, choose_canvas, count_tokens, plan_tiles

RELEASED = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))  # LLaVA-NeXT's checkpoints, in their order
DIALECTS: tuple[Dialect, ...] = ("hf", "llava")

# width, height, tokens in all: llava, hf
VECTORS = [
    (336, 336, 1176, 1176),
    (640, 480, 2340, 2340),
    (480, 640, 2352, 2352),
    (640, 427, 2144, 2144),
    (500, 375, 2340, 2340),
    (1024, 899, 2634, 2634),
    (1920, 1080, 1948, 1948),
    (1008, 336, 2328, 2328),
    (336, 672, 1776, 1776),
    (672, 672, 2928, 2928),
    (300, 200, 976, 1464),
    (161, 184, 1276, 1128),
    (184, 161, 1126, 1272),
    (792, 1408, 1872, 1968),
    (3000, 16, 576, 576),
]
EXTREMES = [(1, 1), (1, 30_000), (30_000, 1), (65_500, 65_500), (65_500, 1), (1, 65_500), (2, 3), (335, 337), (176, 55)]
# 55 * (48 / 176) is 14.999999999999998: transformers rounds it

sides = st.integers(1, 70_000)
grids = st.builds(Grid, rows=st.integers(1, 5), cols=st.integers(1, 5))
layouts = st.sampled_from(["spatial_unpad", "flat"])
encoders = st.tuples(st.integers(1, 32), st.integers(1, 30))  # patch side in pixels, patches along a tile


def random_sizes(count: int, seed: int) -> list[Size]:
    """Half of the sizes are log-uniform over the whole range, half are like ordinary photographs."""
    rng = random.Random(seed)
    wide = [Size(height=int(2 ** rng.uniform(0, 13)), width=int(2 ** rng.uniform(0, 13))) for _ in range(count // 2)]
    usual = [Size(height=rng.randint(100, 1500), width=rng.randint(100, 1500)) for _ in range(count - count // 2)]
    return wide + usual


def released(dialect: Dialect) -> Tiling:
    return Tiling(RELEASED, dialect=dialect)


@pytest.mark.parametrize(("width", "height", "llava", "hf"), VECTORS)
def test_vectors_of_both_dialects(width: int, height: int, llava: int, hf: int) -> None:
    size = Size(height=height, width=width)
    assert count_tokens(size, Tiling.from_grid(Grid(2, 2), dialect="llava")) == llava
    assert count_tokens(size, Tiling.from_grid(Grid(2, 2), dialect="hf")) == hf


def stock_counter(tiling: Tiling) -> LlavaNextProcessor:
    """The transformers processor reduced to the attributes its count uses; a full one needs a tokenizer."""
    processor = object.__new__(LlavaNextProcessor)
    processor.image_processor = SimpleNamespace(image_grid_pinpoints=[list(pair) for pair in tiling.pinpoints])
    processor.patch_size = tiling.patch
    processor.num_additional_image_tokens = 0
    return processor


@pytest.mark.parametrize(
    "tiling",
    [
        released("hf"),
        Tiling.from_grid(Grid(3, 3)),
        Tiling.from_grid(Grid(2, 2), tile=84, patch=14),
        Tiling.from_grid(Grid(1, 4), tile=384, patch=16),
        Tiling(((224, 448), (672, 224)), tile=224, patch=32),
    ],
    ids=["released", "3x3", "tiny", "1x4", "two pinpoints"],
)
def test_hf_dialect_equals_transformers_own_count(tiling: Tiling) -> None:
    stock = stock_counter(tiling)
    extremes = [Size(height=height, width=width) for width, height in EXTREMES]
    for size in random_sizes(3000, seed=1) + extremes:
        expected = stock._get_number_of_features(size.height, size.width, tiling.tile, tiling.tile)
        assert count_tokens(size, tiling) == expected, size


def test_resized_image_equals_transformers_and_is_centred() -> None:
    for size in random_sizes(2000, seed=2):
        plan = plan_tiles(size, released("hf"))
        image = np.empty((size.height, size.width, 1), dtype=np.uint8)
        expected = get_patch_output_size(image, (plan.canvas.height, plan.canvas.width), "channels_last")
        assert (plan.resized.height, plan.resized.width) == expected
        below = plan.canvas.height - plan.resized.height - plan.top
        right = plan.canvas.width - plan.resized.width - plan.left
        assert below - plan.top in (0, 1), size  # an odd pixel goes to the bottom and the right
        assert right - plan.left in (0, 1), size


def brute_force_canvas(size: Size, candidates: list[tuple[int, int]]) -> tuple[int, int]:
    """The rule in integers: rank all (height, width) by effective area, waste and position in the list."""
    ranked = []
    for place, (canvas_height, canvas_width) in enumerate(candidates):
        scale = min(Fraction(canvas_width, size.width), Fraction(canvas_height, size.height))
        used = min(math.floor(size.width * scale) * math.floor(size.height * scale), size.width * size.height)
        ranked.append((-used, canvas_height * canvas_width - used, place))
    return candidates[min(ranked)[2]]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("grid", [Grid(2, 2), Grid(3, 3), Grid(1, 3)], ids=str)
def test_choice_equals_a_brute_force(grid: Grid, dialect: Dialect) -> None:
    tiling = Tiling.from_grid(grid, dialect=dialect)
    candidates = [pair if dialect == "hf" else pair[::-1] for pair in tiling.pinpoints]
    for size in random_sizes(3000, seed=3):
        canvas = choose_canvas(size, tiling)
        assert canvas is not None
        assert (canvas.height, canvas.width) == brute_force_canvas(size, candidates), size


@pytest.mark.parametrize("dialect", DIALECTS)
def test_2x2_grid_plans_as_the_released_pinpoints(dialect: Dialect) -> None:
    ours = Tiling.from_grid(Grid(2, 2), dialect=dialect)
    assert set(ours.pinpoints) == set(RELEASED)
    extremes = [Size(height=height, width=width) for width, height in EXTREMES]
    small = [Size(height=height, width=width) for height, width in itertools.product(range(1, 50), repeat=2)]
    square = [Size(height=side, width=side) for side in range(1, 1200)]
    for size in random_sizes(4000, seed=4) + extremes + small + square:
        assert plan_tiles(size, ours) == plan_tiles(size, released(dialect)), size


def test_dialects_differ_for_small_images() -> None:
    """The dialects read the same pairs in a different order, so the first candidate differs."""
    size = Size(height=200, width=300)
    assert choose_canvas(size, released("llava")) == Size(height=672, width=336)
    assert choose_canvas(size, released("hf")) == Size(height=336, width=672)


def reference_unpad(features: np.ndarray, size: Size) -> np.ndarray:
    """Unpad a feature map (rows, columns) by the reference formula."""
    rows, cols = features.shape
    if size.width / size.height > cols / rows:
        factor = cols / size.width
        padding = (rows - int(size.height * factor)) // 2
        return features[padding : rows - padding, :]
    factor = rows / size.height
    padding = (cols - int(size.width * factor)) // 2
    return features[:, padding : cols - padding]


@pytest.mark.parametrize("grid", [Grid(2, 2), Grid(3, 3)], ids=str)
def test_llava_dialect_keeps_the_same_tokens_as_the_reference(grid: Grid) -> None:
    tiling = Tiling.from_grid(grid, dialect="llava")
    for size in random_sizes(3000, seed=5) + [Size(height=height, width=width) for width, height in EXTREMES]:
        plan = plan_tiles(size, tiling)
        rows, cols = plan.canvas.height // tiling.patch, plan.canvas.width // tiling.patch
        features = np.arange(rows * cols).reshape(rows, cols)
        expected = reference_unpad(features, size)
        bottom, right = plan.kept_top + plan.kept_rows, plan.kept_left + plan.kept_cols
        np.testing.assert_array_equal(features[plan.kept_top : bottom, plan.kept_left : right], expected)
        assert (plan.visual_tokens, plan.newline_tokens) == (576 + expected.size, expected.shape[0])


@pytest.mark.parametrize(
    ("width", "height", "rows", "cols"),
    [
        (1, 1, 24, 24),
        (1, 30_000, 24, 0),  # no column is left, but every row still ends with a newline
        (30_000, 1, 0, 48),
        (65_500, 65_500, 48, 48),
        (3000, 16, 0, 72),
    ],
)
def test_extremes(width: int, height: int, rows: int, cols: int) -> None:
    plan = plan_tiles(Size(height=height, width=width), released("hf"))
    assert (plan.kept_rows, plan.kept_cols) == (rows, cols)
    assert plan.visual_tokens == 576 + rows * cols
    assert plan.newline_tokens == rows


@pytest.mark.parametrize("layout", ["spatial_unpad", "flat"])
@pytest.mark.parametrize(("width", "height"), EXTREMES)
def test_1x1_grid_is_the_thumbnail_alone(width: int, height: int, layout: str) -> None:
    plan = plan_tiles(Size(height=height, width=width), Tiling.from_grid(Grid(1, 1), layout=layout))
    assert plan.grid == Grid(0, 0)
    assert plan.canvas == Size(height=336, width=336)
    assert (plan.num_tiles, plan.visual_tokens, plan.newline_tokens, plan.total_tokens) == (1, 576, 0, 576)


def test_flat_layout_keeps_all_tiles_and_no_newline() -> None:
    plan = plan_tiles(Size(height=672, width=672), Tiling.from_grid(Grid(2, 2), layout="flat"))
    assert (plan.num_tiles, plan.visual_tokens, plan.newline_tokens, plan.total_tokens) == (5, 2880, 0, 2880)
    unpadded = plan_tiles(Size(height=672, width=672), Tiling.from_grid(Grid(2, 2)))
    assert (unpadded.visual_tokens, unpadded.newline_tokens, unpadded.total_tokens) == (2880, 48, 2928)


def test_candidates_of_a_flat_grid() -> None:
    tiling = Tiling.from_grid(Grid(1, 3), tile=28, patch=14)
    assert tiling.pinpoints == ((28, 56), (56, 28), (28, 84), (84, 28))


@given(height=sides, width=sides, grid=grids, layout=layouts, dialect=st.sampled_from(DIALECTS), encoder=encoders)
def test_any_encoder_and_grid(
    height: int, width: int, grid: Grid, layout: str, dialect: Dialect, encoder: tuple[int, int]
) -> None:
    patch, side = encoder
    tiling = Tiling.from_grid(grid, tile=patch * side, patch=patch, layout=layout, dialect=dialect)
    plan = plan_tiles(Size(height=height, width=width), tiling)
    rows, cols = plan.grid.rows * side, plan.grid.cols * side
    assert plan.num_tiles == 1 + plan.grid.rows * plan.grid.cols
    assert plan.visual_tokens == side**2 + plan.kept_rows * plan.kept_cols
    assert plan.newline_tokens == (plan.kept_rows if layout == "spatial_unpad" else 0)
    assert plan.kept_rows + 2 * plan.kept_top == rows
    assert plan.kept_cols + 2 * plan.kept_left == cols
    assert plan.kept_rows == rows or plan.kept_cols == cols, "padding is on two opposite sides at most"
    assert min(plan.kept_rows, plan.kept_cols, plan.top, plan.left) >= 0
    if layout == "flat":
        assert plan.total_tokens == side**2 * plan.num_tiles
    if plan.num_tiles > 1:
        assert plan.canvas in tiling.canvases
        assert plan.resized.height == plan.canvas.height or plan.resized.width == plan.canvas.width
        assert plan.top + plan.resized.height <= plan.canvas.height
        assert plan.left + plan.resized.width <= plan.canvas.width


@given(height=sides, width=sides, grid=grids)
def test_transposed_image_and_list_give_a_transposed_plan(height: int, width: int, grid: Grid) -> None:
    """The llava dialect is the hf dialect with transposed pairs, so transposing the image transposes the plan."""
    pinpoints = Tiling.from_grid(grid).pinpoints
    upright = choose_canvas(Size(height=height, width=width), Tiling(pinpoints, dialect="hf"))
    turned = choose_canvas(Size(height=width, width=height), Tiling(pinpoints, dialect="llava"))
    assert (upright is None) == (turned is None)
    if upright is not None and turned is not None:
        assert (upright.height, upright.width) == (turned.width, turned.height)


@pytest.mark.parametrize(
    ("text", "grid"), [("2x2", Grid(2, 2)), (" 1X12 ", Grid(rows=1, cols=12)), ("3x1", Grid(3, 1))]
)
def test_grid_is_read_rows_first(text: str, grid: Grid) -> None:
    assert Grid.parse(text) == grid
    assert str(grid) == text.strip().lower()


@pytest.mark.parametrize("text", ["", "2", "2x", "x2", "2x2x2", "-1x2", "2*2", "2.0x2", "two"])
def test_unreadable_grid_error_names_the_form(text: str) -> None:
    with pytest.raises(UsageError, match="expected ROWSxCOLUMNS such as 2x2"):
        Grid.parse(text)


def test_of_equally_effective_canvases_the_smaller_wins_in_any_order() -> None:
    tiling = Tiling(((672, 672), (336, 672)), 336, 14, "flat", "hf")
    assert choose_canvas(Size(height=100, width=100), tiling) == Size(height=336, width=672)


@pytest.mark.parametrize("text", ["0x2", "2x0", "13x1", "1x100"])
def test_impossible_grid_error_names_the_limits(text: str) -> None:
    with pytest.raises(UsageError, match=f"grid '{text}': rows and columns must be from 1 to 12"):
        Grid.parse(text)


@pytest.mark.parametrize(("height", "width"), [(0, 5), (5, 0), (-1, -1)])
def test_impossible_size_error_names_the_size(height: int, width: int) -> None:
    with pytest.raises(UsageError, match=rf"image size {width}x{height} \(width x height\): both sides"):
        Size(height=height, width=width)


@pytest.mark.parametrize(("tile", "patch"), [(336, 0), (335, 14), (0, 14), (7, 14), (336, -14)])
def test_tile_that_is_not_a_multiple_of_the_patch(tile: int, patch: int) -> None:
    with pytest.raises(UsageError, match=f"tile side {tile} must be a positive multiple of the patch side {patch}"):
        Tiling.from_grid(Grid(2, 2), tile=tile, patch=patch)


@pytest.mark.parametrize("pair", [(336, 500), (0, 336), (-336, 336), (168, 336), (336,), (336, 336, 336)])
def test_pinpoint_that_is_not_a_multiple_of_the_tile(pair: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=rf"pinpoint \[{', '.join(map(str, pair))}\]: both sides must be positive"):
        Tiling(((336, 672), pair))


def test_the_default_is_that_of_the_released_model() -> None:
    assert Tiling().pinpoints == ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
    assert Tiling().patches == 576


@pytest.mark.parametrize(
    ("size", "canvas", "effective", "wasted"),
    [
        (Size(height=480, width=640), Size(height=672, width=672), 640 * 480, 672 * 672 - 640 * 480),
        (Size(height=1000, width=2000), Size(height=336, width=672), 336 * 672, 0),
        (Size(height=100, width=100), Size(height=336, width=672), 100 * 100, 336 * 672 - 100 * 100),
    ],
)
def test_areas_of_a_canvas(size: Size, canvas: Size, effective: int, wasted: int) -> None:
    """Effective pixels, at most those of the image, and the rest."""
    assert canvas_areas(size, canvas) == (effective, wasted)


def test_a_plan_takes_microseconds() -> None:
    """The budget is 20 us; measured 13 us, and 22 us while another process uses the same core."""
    tiling, size, calls = Tiling.from_grid(Grid(2, 2)), Size(height=480, width=640), 50
    timer = timeit.Timer(lambda: plan_tiles(size, tiling), timer=time.thread_time)
    seconds = min(timer.repeat(repeat=400, number=calls)) / calls
    assert seconds < 40e-6, f"{seconds * 1e6:.1f} us a call"


@given(sides, sides, grids, layouts, encoders, st.sampled_from(DIALECTS))
def test_each_tile_keeps_what_a_mask_keeps(
    height: int, width: int, grid: Grid, layout: str, encoder: tuple[int, int], dialect: Dialect
) -> None:
    patch, side = encoder
    tile = patch * side
    pinpoint = (grid.rows * tile, grid.cols * tile)[:: 1 if dialect == "hf" else -1]
    tiling = Tiling((pinpoint,), tile, patch, layout, dialect)  # one canvas, so that whole tiles are cut away, too
    plan = plan_tiles(Size(height=height, width=width), tiling)
    assert plan.grid == grid
    mask = np.zeros((plan.grid.rows * side, plan.grid.cols * side), bool)
    mask[plan.kept_top : plan.kept_top + plan.kept_rows, plan.kept_left : plan.kept_left + plan.kept_cols] = True
    for row, col in itertools.product(range(plan.grid.rows), range(plan.grid.cols)):
        assert plan.tile_tokens(row, col) == mask[row * side :, col * side :][:side, :side].sum()
