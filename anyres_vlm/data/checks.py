"""What a record must be to become a sample: pictures of possible sizes, not too long, something to learn."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from anyres_vlm.data.headers import read_size
from anyres_vlm.data.images import JPEG_PIXELS_LIMIT
from anyres_vlm.errors import DataError
from anyres_vlm.geometry import Size, TilePlan, Tiling, plan_tiles
from anyres_vlm.schema import IGNORE_INDEX, ImageRef, Sample, token_repeats

LONGEST_SIDE = 65_500  # pixels: what JPEG's own library writes
MOST_ELONGATED = 1000  # longer side over shorter


def plan_image(image: ImageRef, tiling: Tiling) -> TilePlan:
    """The plan of one image from its header. Raises `DataError` for a size that no picture has."""
    size = read_size(image)
    longer, shorter = max(size.height, size.width), min(size.height, size.width)
    if longer > LONGEST_SIDE or longer > MOST_ELONGATED * shorter or longer * shorter > JPEG_PIXELS_LIMIT:
        raise DataError(
            f"{image.name}: {size.width}x{size.height} pixels; expected sides up to {LONGEST_SIDE:,}, at most "
            f"{MOST_ELONGATED}:1, and at most {JPEG_PIXELS_LIMIT:,} pixels: scale the image or remove it",
            kind="absurd_image",
        )
    return _plan_size(size, tiling)


@lru_cache(maxsize=1 << 16)  # datasets have far fewer sizes than images
def _plan_size(size: Size, tiling: Tiling) -> TilePlan:
    return plan_tiles(size, tiling)


def check_sample(sample: Sample, max_length: int, image_token_id: int) -> None:
    """Raises `DataError` for a sample that is too long, saying what a truncation would cut, or teaches nothing."""
    if sample.length > max_length:
        is_image = sample.input_ids == image_token_id
        spans = token_repeats(sample.input_ids, sample.plans, image_token_id)
        beyond = np.clip(np.cumsum(spans) - max_length, 0, spans)
        supervised = np.count_nonzero((beyond > 0) & (sample.labels != IGNORE_INDEX))
        raise DataError(
            f"record {sample.id}: {sample.length:,} tokens exceed max_length={max_length:,}: a truncation would cut "
            f"{beyond.sum():,} of them, {beyond[is_image].sum():,} visual and {supervised:,} supervised: "
            "raise it or lower --grid",
            kind="too_long",
        )
    if sample.num_supervised == 0:
        raise DataError(f"record {sample.id}: no supervised token", kind="unsupervised")
