"""Records to samples: image sizes from headers, plans, token ids and labels."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from anyres_vlm.config import TemplateName
from anyres_vlm.data.conversation import ConversationTokenizer
from anyres_vlm.data.headers import read_size
from anyres_vlm.data.sources import Reject, report_rejects
from anyres_vlm.errors import DataError
from anyres_vlm.geometry import Tiling, plan_tiles
from anyres_vlm.schema import Record, Sample

CHUNK = 1000  # conversations tokenised at once


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
    samples: list[Sample] = []
    rejects: list[Reject] = []
    for start in range(0, len(records), CHUNK):
        chunk = records[start : start + CHUNK]
        for record, encoded in zip(chunk, conversation.encode(chunk), strict=True):
            try:
                if isinstance(encoded, DataError):
                    raise encoded
                plans = tuple(plan_tiles(read_size(image), tiling) for image in record.images)
                sample = Sample(record.id, *encoded, record.images, plans)
                _check(sample, max_length)
                samples.append(sample)
            except DataError as error:
                rejects.append(Reject(record.id, str(error)))
    report_rejects("tokenising", rejects, len(records), max_bad_fraction)
    return samples


def _check(sample: Sample, max_length: int) -> None:
    if sample.length > max_length:
        visual = sum(plan.total_tokens for plan in sample.plans)
        raise DataError(
            f"record {sample.id}: {sample.length} tokens ({visual} of them visual) exceed max_length={max_length} by "
            f"{sample.length - max_length}: raise it or lower --grid"
        )
    if sample.num_supervised == 0:
        raise DataError(f"record {sample.id}: no supervised token")
