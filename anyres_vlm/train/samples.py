"""The tokenised samples of a stage, from the user's files or from the renderer."""

from __future__ import annotations

import logging
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from anyres_vlm.config import RunConfig, StageName
from anyres_vlm.data.dataset import tokenise
from anyres_vlm.data.sources import read_records
from anyres_vlm.model.vlm import VisionLanguageModel
from anyres_vlm.schema import Sample
from anyres_vlm.synthetic.dataset import write_dataset

logger = logging.getLogger(__name__)


def load_samples(
    config: RunConfig,
    stage: StageName,
    output: Path,
    model: VisionLanguageModel,
    tokenizer: PreTrainedTokenizerFast,
) -> list[Sample]:
    """Read, check and tokenise a stage's data; the renderer's goes to `output/data` and is reused when it is there."""
    settings, data = config.stage(stage), config.stage(stage).data
    if data.rendered is not None:
        assert data.samples is not None, "validated by the configuration"
        path = write_dataset(output / "data" / data.rendered, data.rendered, data.samples, config.seed)
        images: Path | None = path.parent
    else:
        assert data.path is not None, "validated by the configuration"
        path, images = data.path, data.images
    records = read_records(path, images, data.max_bad_fraction)
    template = settings.template or config.model.template
    return tokenise(records, template, tokenizer, model.tiling, settings.max_length, data.max_bad_fraction)
