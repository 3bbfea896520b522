"""Seeded photometric augmentation: colours and JPEG compression, nothing that moves a pixel."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from anyres_vlm.config import AugmentConfig


class Augmentation:
    """Changes pictures by (run seed, epoch, sample) alone: the same key gives the same pixels in every process.

    It gets the picture in the size in which the encoder will see it, so that a change is as strong for a scan of 9
    megapixels as for a thumbnail, and as cheap.
    """

    def __init__(self, config: AugmentConfig) -> None:
        # Start-up time: a second, for nothing where nothing is augmented. The variable stops a look-up of new releases.
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
        """(H, W, 3) RGB -> the same shape. `key`: run seed, epoch, sample and, where it has several, the image."""
        seed = np.random.SeedSequence([number % 2**64 for number in key]).generate_state(1)[0]  # none may be negative
        self._compose.set_random_seed(int(seed))
        changed: NDArray[np.uint8] = self._compose(image=pixels)["image"]
        return changed
