"""From a picture to the encoder's tiles, by its plan."""

from __future__ import annotations

import numpy as np
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image

from anyres_vlm.geometry import TilePlan


def cut_tiles(image: Image.Image, plan: TilePlan) -> NDArray[np.uint8]:
    """Thumbnail first, then the canvas' tiles row by row. RGB image of the plan's size -> (T, 3, S, S) uint8.

    Bicubic and antialiased; padding is black before normalisation. The thumbnail does not keep the aspect ratio.
    """
    assert (image.height, image.width) == (plan.image.height, plan.image.width), "the plan is of this image"
    thumbnail = image.resize((plan.tile, plan.tile), Image.Resampling.BICUBIC)
    tiles = rearrange(np.asarray(thumbnail), "h w c -> 1 c h w")
    if plan.num_tiles > 1:
        canvas = Image.new("RGB", (plan.canvas.width, plan.canvas.height))
        resized = image.resize((plan.resized.width, plan.resized.height), Image.Resampling.BICUBIC)
        canvas.paste(resized, (plan.left, plan.top))
        grid = rearrange(np.asarray(canvas), "(r h) (c w) k -> (r c) k h w", r=plan.grid.rows, c=plan.grid.cols)
        tiles = np.concatenate([tiles, grid])
    return np.ascontiguousarray(tiles)
