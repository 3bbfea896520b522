"""Tiles compared with transformers' own image processors, from the same bytes.

The torchvision-backed one is what `AutoProcessor` loads: `exact` has its pixels. The PIL-backed one rounds otherwise.
"""

from __future__ import annotations

from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import LlavaNextImageProcessor, LlavaNextImageProcessorPil

from anyres_vlm.data.images import decode_pixels
from anyres_vlm.data.tiling import cut_tiles, tile_image
from anyres_vlm.errors import DataError
from anyres_vlm.geometry import Grid, Size, TilePlan, Tiling, plan_tiles

EXACT = 0  # levels of 255 to the torchvision-backed processor, everywhere
EXACT_PIL = 3  # to the PIL-backed one; as far as the two are from one another, seen where pictures are enlarged
FAST_MEAN, FAST_P99 = 1.0, 3.0
SHAPES = [
    (640, 480),
    (480, 640),
    (300, 200),
    (161, 184),
    (184, 161),
    (1920, 1080),
    (1999, 1501),
    (50, 1000),
    (1000, 50),
    (3000, 16),
    (84, 84),
    (2, 3),
    (1, 1),
]
TILINGS = [(84, 14, "2x2"), (56, 14, "3x3"), (112, 16, "1x3"), (336, 14, "2x2")]
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg")


def smooth(width: int, height: int) -> Image.Image:
    blobs = np.random.default_rng(width + height).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(blobs).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, image_format: str = "JPEG", **options: object) -> bytes:
    stream = BytesIO()
    image.save(stream, image_format, **options)
    return stream.getvalue()


def stock(data: bytes, tiling: Tiling, kind: type = LlavaNextImageProcessor) -> np.ndarray:
    pinpoints = tiling.pinpoints or ((tiling.tile, tiling.tile),)
    processor = kind(
        size={"shortest_edge": tiling.tile},
        crop_size={"height": tiling.tile, "width": tiling.tile},
        image_grid_pinpoints=[list(pair) for pair in pinpoints],
        do_normalize=False,
        do_rescale=False,
    )
    return np.asarray(processor(images=Image.open(BytesIO(data)))["pixel_values"][0]).astype(int)


def shown(tiles: np.ndarray, plan: TilePlan) -> np.ndarray:
    """Return the pixels of the tiles without padding, thumbnail first."""
    rows, cols, side = plan.grid.rows, plan.grid.cols, plan.tile
    grid = tiles[1:].reshape(rows, cols, 3, side, side).transpose(2, 0, 3, 1, 4).reshape(3, rows * side, cols * side)
    inside = grid[:, plan.top : plan.top + plan.resized.height, plan.left : plan.left + plan.resized.width]
    return np.concatenate([tiles[0].ravel(), inside.ravel()])


def planned(image: Image.Image, tiling: Tiling) -> TilePlan:
    return plan_tiles(Size(height=image.height, width=image.width), tiling)


def assert_close(data: bytes, plan: TilePlan, tiling: Tiling) -> bool:
    """Check that both modes keep their limits. Returns whether `fast` took a short cut."""
    expected = stock(data, tiling)
    tiles = {mode: tile_image(data, plan, "a picture", mode) for mode in ("exact", "fast")}
    for found in tiles.values():
        assert found.shape == expected.shape == (plan.num_tiles, 3, plan.tile, plan.tile)
        assert found.dtype == np.uint8
        assert found.flags.c_contiguous
    assert np.abs(expected - tiles["exact"]).max() <= EXACT
    assert np.abs(stock(data, tiling, LlavaNextImageProcessorPil) - tiles["exact"]).max() <= EXACT_PIL
    distance = np.abs(shown(expected, plan) - shown(tiles["fast"], plan))
    assert distance.mean() <= FAST_MEAN
    assert np.percentile(distance, 99) <= FAST_P99
    return not np.array_equal(tiles["fast"], tiles["exact"])


@pytest.mark.parametrize(("width", "height"), SHAPES)
@pytest.mark.parametrize(("tile", "patch", "grid"), TILINGS)
def test_every_shape(width: int, height: int, tile: int, patch: int, grid: str) -> None:
    image = smooth(width, height)
    tiling = Tiling.from_grid(Grid.parse(grid), tile=tile, patch=patch)
    assert_close(encoded(image), planned(image, tiling), tiling)


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_format(image_format: str) -> None:
    image, tiling = smooth(500, 300), Tiling.from_grid(Grid(2, 2), tile=84)
    assert not assert_close(encoded(image, image_format), planned(image, tiling), tiling)


@pytest.mark.skipif(find_spec("skimage") is None, reason="the photographs are scikit-image's")
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs(name: str) -> None:
    photograph = Image.open(Path(find_spec("skimage").origin).parent / "data" / name).convert("RGB")
    width, height = photograph.size
    short_cuts = 0
    for quality, scale, tiling in (
        (95, 1.0, Tiling()),
        (85, 1.9, Tiling()),
        (85, 3.1, Tiling()),
        (90, 1.0, Tiling.from_grid(Grid(3, 3), tile=84)),
        (90, 1.7, Tiling.from_grid(Grid(2, 2), tile=84)),
    ):
        image = photograph.resize((int(width * scale), int(height * scale)), Image.Resampling.LANCZOS)
        short_cuts += assert_close(encoded(image, quality=quality), planned(image, tiling), tiling)
    assert short_cuts >= 2, "fast does what exact does: the limits above were not tried"


def test_the_last_half_pixel_of_an_odd_side_shifts_nothing() -> None:
    """2 x 841 rows of stripes: taken for 2 x 842 of them, the lower ones would be half a pixel off."""
    rows = np.sin(np.arange(841)[:, None] * 2 * np.pi / 12) * 120 + 128
    image = Image.fromarray(np.broadcast_to(rows, (841, 1681)).astype(np.uint8)).convert("RGB")
    data, plan = encoded(image, quality=50), planned(image, Tiling.from_grid(Grid(2, 2), tile=84))
    half, size = decode_pixels(data, "stripes", 4.9)
    assert half.shape == (421, 841, 3)
    assert size == plan.image
    fast, exact = (tile_image(data, plan, "stripes", mode).astype(int) for mode in ("fast", "exact"))
    assert np.abs(fast - exact).max() <= 2  # seen: 1; without the correction: 6


@pytest.mark.parametrize("layout", ["flat", "spatial_unpad"])
def test_the_layout_changes_no_pixel_and_no_grid_is_the_thumbnail(layout: str) -> None:
    image = smooth(300, 200)
    data = encoded(image)
    tiling = Tiling.from_grid(Grid(2, 2), tile=84, layout=layout)
    expected = stock(data, tiling)
    assert np.array_equal(tile_image(data, planned(image, tiling), "", "exact"), expected)
    assert np.array_equal(cut_tiles(Image.open(BytesIO(data)), planned(image, tiling)), expected)
    alone = Tiling.from_grid(Grid(1, 1), tile=84, layout=layout)
    for mode in ("fast", "exact"):
        tiles = tile_image(data, planned(image, alone), "", mode)
        assert tiles.shape == (1, 3, 84, 84)
        assert np.array_equal(tiles[0], expected[0])


def test_a_file_of_another_size_is_refused() -> None:
    plan = planned(smooth(2000, 1000), Tiling())
    for size in ((1000, 500), (1000, 2000), (1999, 1000)):
        for mode in ("fast", "exact"):
            with pytest.raises(DataError, match=rf"^b\.jpg: its size is {size[0]}x{size[1]}, expected 2000x1000"):
                tile_image(encoded(smooth(*size)), plan, "b.jpg", mode)
