"""Records to samples: image sizes from headers, plans, token ids and labels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from transformers import PreTrainedTokenizerFast

from anyres_vlm.config import TemplateName
from anyres_vlm.data.conversation import ConversationTokenizer
from anyres_vlm.data.headers import read_size
from anyres_vlm.data.sources import Reject, report_rejects
from anyres_vlm.errors import DataError
from anyres_vlm.geometry import Size, TilePlan, Tiling, plan_tiles
from anyres_vlm.schema import IGNORE_INDEX, IMAGE_TOKEN, ImageRef, Record, Sample

CHUNK = 1000  # conversations tokenised at once
LONGEST_SIDE = 65_500  # pixels: what JPEG's own library writes
MOST_ELONGATED = 1000  # longer side over shorter


def tokenise(
    records: Sequence[Record],
    template: TemplateName,
    tokenizer: PreTrainedTokenizerFast,
    tiling: Tiling,
    max_length: int,
    max_bad_fraction: float,
) -> list[Sample]:
    """Samples of all good records, in order.

    A record with a missing or unreadable image, without a supervised token or longer than `max_length` is left out
    whole and counted: nothing is truncated. Raises `DataError` when too many are.
    """
    conversation = ConversationTokenizer(template, tokenizer)
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    samples: list[Sample] = []
    rejects: list[Reject] = []
    for start in range(0, len(records), CHUNK):
        chunk = records[start : start + CHUNK]
        for record, encoded in zip(chunk, conversation.encode(chunk), strict=True):
            try:
                if isinstance(encoded, DataError):
                    raise encoded
                plans = tuple(plan_image(image, tiling) for image in record.images)
                sample = Sample(record.id, *encoded, record.images, plans)
                check_sample(sample, max_length, image_token_id)
                samples.append(sample)
            except DataError as error:
                rejects.append(Reject(record.id, str(error)))
    report_rejects("tokenising", rejects, len(records), max_bad_fraction)
    return samples


def plan_image(image: ImageRef, tiling: Tiling) -> TilePlan:
    """The plan of one image from its header. Raises `DataError` for a size that no picture has."""
    size = read_size(image)
    longer, shorter = max(size.height, size.width), min(size.height, size.width)
    if longer > LONGEST_SIDE or longer > MOST_ELONGATED * shorter:
        raise DataError(
            f"{image.name}: {size.width}x{size.height} pixels; expected sides up to {LONGEST_SIDE:,} and at most "
            f"{MOST_ELONGATED}:1: scale the image or remove it",
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
        spans = np.ones(len(is_image), np.int64)  # positions of each token
        spans[is_image] = [plan.total_tokens for plan in sample.plans]
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
