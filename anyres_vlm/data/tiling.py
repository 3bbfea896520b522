"""From a picture to the encoder's tiles, by its plan.

Two modes. `exact` has the pixels of transformers' default (torchvision-backed) LlavaNext processor: the same kernel on
the same decoded image; inference uses it. `fast`, for training, decodes a JPEG at half its size where the resize throws
the rest away: by a mean of at most 1 level of 255 another picture, 3 at the 99th percentile on photographs.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import interpolate

from anyres_vlm.config import TilingMode
from anyres_vlm.data.images import decode_pixels
from anyres_vlm.errors import DataError
from anyres_vlm.geometry import Size, TilePlan

Pixels = NDArray[np.uint8]  # (H, W, 3), RGB
REUSED = 1.25  # tile sides of what `fast` makes the thumbnail from; worst of 9 photographs: mean 0.61 levels, p99 3


def tile_image(
    data: bytes, plan: TilePlan, name: str, mode: TilingMode, augment: Callable[[Pixels], Pixels] | None = None
) -> NDArray[np.uint8]:
    """Thumbnail first, then the canvas' tiles row by row. A file's bytes -> (T, 3, S, S) uint8.

    Bicubic and antialiased; padding is black before normalisation. The thumbnail does not keep the aspect ratio.
    `augment` gets the picture in the size in which it is shown, so its strength is the same for every image.
    Raises `DataError` for a picture that is broken or not of the plan's size; `name` says which.
    """
    pixels, size = decode_pixels(data, name, _fineness(plan) if mode == "fast" else 1.0)
    if size != plan.image:
        raise DataError(
            f"{name}: its size is {size.width}x{size.height}, planned were {plan.image.width}x{plan.image.height}: "
            f"it changed since the run began"
        )
    return _cut(pixels, plan, mode, augment)


def cut_tiles(image: Image.Image, plan: TilePlan) -> NDArray[np.uint8]:
    """The `exact` tiles of an RGB image that is in memory already, (T, 3, S, S) uint8."""
    assert (image.height, image.width) == (plan.image.height, plan.image.width), "the plan is of this image"
    return _cut(np.array(image), plan, "exact")


def _cut(
    pixels: Pixels, plan: TilePlan, mode: TilingMode, augment: Callable[[Pixels], Pixels] | None = None
) -> NDArray[np.uint8]:
    whole, thumbnail = plan.image, Size(height=plan.tile, width=plan.tile)
    shown = _resize(pixels, whole, plan.resized)
    if augment is not None:
        shown = augment(shown)
    if augment is not None or plan.num_tiles == 1 or (mode == "fast" and _thumbnail_from_shown(plan)):
        pixels, whole = shown, plan.resized
    tiles = np.zeros((plan.num_tiles, 3, plan.tile, plan.tile), np.uint8)
    for channel, plane in zip(tiles[0], cv2.split(_resize(pixels, whole, thumbnail)), strict=True):
        channel[:] = plane
    planes = cv2.split(shown)
    for tile, (row, col) in zip(tiles[1:], product(range(plan.grid.rows), range(plan.grid.cols)), strict=True):
        rows, on_rows = _overlap(plan.top - row * plan.tile, plan.resized.height, plan.tile)
        cols, on_cols = _overlap(plan.left - col * plan.tile, plan.resized.width, plan.tile)
        for channel, plane in zip(tile, planes, strict=True):
            channel[on_rows, on_cols] = plane[rows, cols]
    return tiles


def _thumbnail_from_shown(plan: TilePlan) -> bool:
    """Whether the canvas' picture is enough: made smaller than the image, and still larger than the thumbnail."""
    return _fineness(plan) > 1 and min(plan.resized.height, plan.resized.width) >= REUSED * plan.tile


def _fineness(plan: TilePlan) -> float:
    """The image's pixels for each shown one, where it has the fewest; below 1 the image is enlarged."""
    high, wide = max(plan.resized.height, plan.tile), max(plan.resized.width, plan.tile)
    return min(plan.image.height / high, plan.image.width / wide)


def _overlap(start: int, length: int, tile: int) -> tuple[slice, slice]:
    """The part of an image that lies on a tile, in the image's pixels and in the tile's, from which `start` is seen."""
    first, last = max(start, 0), max(min(start + length, tile), 0)
    return slice(first - start, last - start), slice(first, last)


def _resize(pixels: Pixels, whole: Size, target: Size) -> Pixels:
    """(H, W, 3) -> (h, w, 3), by the ratio of the target to the whole size, of which the pixels may be the half."""
    if Size(*pixels.shape[:2]) == target == whole:
        return pixels
    # Torch's vectorised kernel is for channels that lie together; it looks at the strides, also of a batch of one.
    planes = torch.from_numpy(pixels).view(1, *pixels.shape).permute(0, 3, 1, 2)
    if Size(*pixels.shape[:2]) == whole:
        resized = interpolate(planes, (target.height, target.width), mode="bicubic", antialias=True)
    else:
        # The half of an odd side is rounded up, but its last pixel is half a pixel. Torch rounds the size down.
        factors = tuple(
            2 * new / old * (1 + 1e-9) for new, old in ((target.height, whole.height), (target.width, whole.width))
        )
        resized = interpolate(planes, scale_factor=factors, mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()
