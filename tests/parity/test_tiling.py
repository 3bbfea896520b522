"""Tiles against transformers' own image processor: the same pixels within one level of 255."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from transformers import LlavaNextImageProcessorPil

from anyres_vlm.data.tiling import cut_tiles
from anyres_vlm.geometry import Grid, Size, Tiling, plan_tiles

LEVEL = 1  # of 255; worst seen over these shapes: 0
SHAPES = [
    (640, 480),
    (480, 640),
    (300, 200),
    (161, 184),
    (184, 161),
    (1920, 1080),
    (50, 1000),
    (1000, 50),
    (84, 84),
    (1, 1),
]


@pytest.mark.parametrize(("width", "height"), SHAPES)
@pytest.mark.parametrize(("tile", "patch", "grid"), [(84, 14, "2x2"), (56, 14, "3x3"), (112, 16, "1x3")])
def test_tiles_equal_transformers(width: int, height: int, tile: int, patch: int, grid: str) -> None:
    smooth = np.random.default_rng(width + height).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(smooth).resize((width, height), Image.Resampling.BICUBIC)
    tiling = Tiling.from_grid(Grid.parse(grid), tile=tile, patch=patch)
    plan = plan_tiles(Size(height=height, width=width), tiling)
    ours = cut_tiles(image, plan)
    assert ours.dtype == np.uint8
    assert ours.flags.c_contiguous
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": tile},
        crop_size={"height": tile, "width": tile},
        image_grid_pinpoints=[list(pair) for pair in tiling.pinpoints],
        do_normalize=False,
        do_rescale=False,
    )
    theirs = np.asarray(processor(images=image, return_tensors="np")["pixel_values"][0])
    assert theirs.shape == ours.shape
    assert np.abs(theirs.astype(int) - ours.astype(int)).max() <= LEVEL
