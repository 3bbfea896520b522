"""Seeded photometric augmentation: colours and JPEG compression, no geometric changes."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from anyres_vlm.config import AugmentConfig


class Augmentation:
    """Augments images depending on (run seed, epoch, sample) only: a key gives the same pixels in every process.

    It is applied after resizing to the size that the encoder sees, so strength and cost are the same for a scan of 9
    megapixels as for a small image.
    """

    def __init__(self, config: AugmentConfig) -> None:
        # Imported here to save a second without augmentation. The variable disables the online check for new releases.
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
