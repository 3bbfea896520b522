"""Cut images into tiles by their plan, with optional photometric augmentation.

(H, W, 3) RGB -> (T, 3, S, S) uint8, the thumbnail first. Mode `exact` gives the pixels of transformers' processor. Mode
`fast` may decode a large JPEG at half its size and scale the thumbnail from the resized image.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import product

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import interpolate

from anyres_vlm.config import AugmentConfig, TilingMode
from anyres_vlm.data.images import decode_pixels
from anyres_vlm.errors import DataError
from anyres_vlm.geometry import Size, TilePlan

# Smallest side of the resized image, in tiles, from which `fast` scales the thumbnail. Largest difference of 9
# photographs: mean 0.61 levels, 99th percentile 3.
SHARED_SIDE = 1.25
Pixels = NDArray[np.uint8]  # (H, W, 3), RGB


def tile_image(
    data: bytes, plan: TilePlan, name: str, mode: TilingMode, augment: Callable[[Pixels], Pixels] | None = None
) -> NDArray[np.uint8]:
    """Return the thumbnail, then the tiles of the canvas row by row. Bytes of a file -> (T, 3, S, S) uint8.

    Resizing is bicubic and antialiased; padding is black before normalisation. The thumbnail does not keep the aspect
    ratio. `augment` is applied after resizing to the canvas, so its strength is the same for every image. Raises
    `DataError`, with `name`, for an image that is broken or does not have the size in the plan.
    """
    pixels, size = decode_pixels(data, name, _downscaling(plan) if mode == "fast" else 1.0)
    if size != plan.image:
        raise DataError(
            f"{name}: its size is {size.width}x{size.height}, expected {plan.image.width}x{plan.image.height}: "
            f"it has changed since it was indexed; run anyres index --rebuild"
        )
    return _cut(pixels, plan, mode, augment)


def cut_tiles(image: Image.Image, plan: TilePlan) -> NDArray[np.uint8]:
    """Return the `exact` tiles of an RGB image in memory, (T, 3, S, S) uint8."""
    assert (image.height, image.width) == (plan.image.height, plan.image.width), "the plan was made for this image"
    return _cut(np.array(image), plan, "exact")


def _cut(
    pixels: Pixels, plan: TilePlan, mode: TilingMode, augment: Callable[[Pixels], Pixels] | None = None
) -> NDArray[np.uint8]:
    whole, thumbnail = plan.image, Size(height=plan.tile, width=plan.tile)
    on_canvas = _resize(pixels, whole, plan.resized)
    if augment is not None:
        on_canvas = augment(on_canvas)
    if augment is not None or plan.num_tiles == 1 or (mode == "fast" and _thumbnail_from_canvas(plan)):
        pixels, whole = on_canvas, plan.resized
    tiles = np.zeros((plan.num_tiles, 3, plan.tile, plan.tile), np.uint8)
    for channel, plane in zip(tiles[0], cv2.split(_resize(pixels, whole, thumbnail)), strict=True):
        channel[:] = plane
    planes = cv2.split(on_canvas)
    for tile, (row, col) in zip(tiles[1:], product(range(plan.grid.rows), range(plan.grid.cols)), strict=True):
        rows, on_rows = _overlap(plan.top - row * plan.tile, plan.resized.height, plan.tile)
        cols, on_cols = _overlap(plan.left - col * plan.tile, plan.resized.width, plan.tile)
        for channel, plane in zip(tile, planes, strict=True):
            channel[on_rows, on_cols] = plane[rows, cols]
    return tiles


def _thumbnail_from_canvas(plan: TilePlan) -> bool:
    """Return whether the image on the canvas, scaled down, is still large enough to scale the thumbnail from it."""
    return _downscaling(plan) > 1 and min(plan.resized.height, plan.resized.width) >= SHARED_SIDE * plan.tile


def _downscaling(plan: TilePlan) -> float:
    """Return the smallest downscaling factor of the image over axes and outputs; below 1 it is enlarged."""
    high, wide = max(plan.resized.height, plan.tile), max(plan.resized.width, plan.tile)
    return min(plan.image.height / high, plan.image.width / wide)


def _overlap(start: int, length: int, tile: int) -> tuple[slice, slice]:
    """Return the overlap of image and tile in pixels of each; `start` is the image's offset relative to the tile."""
    first, last = max(start, 0), max(min(start + length, tile), 0)
    return slice(first - start, last - start), slice(first, last)


def _resize(pixels: Pixels, whole: Size, target: Size) -> Pixels:
    """Resize from `whole` to `target` size; the pixels may be decoded at half size. (H, W, 3) -> (h, w, 3)."""
    if Size(*pixels.shape[:2]) == target == whole:
        return pixels
    # Torch's vectorised kernel needs interleaved channels; it checks the strides, even those of a batch of 1.
    planes = torch.from_numpy(pixels).view(1, *pixels.shape).permute(0, 3, 1, 2)
    if Size(*pixels.shape[:2]) == whole:
        resized = interpolate(planes, (target.height, target.width), mode="bicubic", antialias=True)
    else:
        # Half of an odd side is rounded up, so its last pixel is half as wide. Torch rounds the target size down.
        factors = tuple(
            2 * new / old * (1 + 1e-9) for new, old in ((target.height, whole.height), (target.width, whole.width))
        )
        resized = interpolate(planes, scale_factor=factors, mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


class Augmentation:
    """Seeded changes of colour and JPEG compression: a key gives the same pixels in every process.

    Apply it after resizing, so that strength and cost do not depend on the size of the original image.
    """

    def __init__(self, config: AugmentConfig) -> None:
        # Imported here because it takes a second. The variable disables its online check for new releases.
        os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
        import albumentations

        change = (1 - config.color, 1 + config.color)
        self._compose = albumentations.Compose(
            [
                albumentations.ColorJitter(change, change, change, hue=(0, 0), p=config.probability),
                albumentations.ImageCompression(quality_range=(config.jpeg_quality, 100), p=config.probability),
            ]
        )

    def __call__(self, pixels: NDArray[np.uint8], key: Sequence[int]) -> NDArray[np.uint8]:
        """Augment an image. (H, W, 3) RGB -> the same shape. `key` is run seed, epoch, sample and image number."""
        seed = np.random.SeedSequence([number % 2**64 for number in key]).generate_state(1)[0]  # must not be negative
        self._compose.set_random_seed(int(seed))
        changed: NDArray[np.uint8] = self._compose(image=pixels)["image"]
        return changed
