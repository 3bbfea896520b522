"""The samples of a stage: the user's data or the renderer's, indexed and ready to be packed."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from anyres_vlm.config import DataConfig, RunConfig, StageName
from anyres_vlm.data.conversation import ConversationTokenizer
from anyres_vlm.data.index.build import build_index
from anyres_vlm.data.index.rejects import count_rejects, rejects_path
from anyres_vlm.data.index.rows import IndexSettings
from anyres_vlm.data.samples import IndexedSamples
from anyres_vlm.data.sources import open_source
from anyres_vlm.errors import UsageError
from anyres_vlm.model.attention import sliding_window
from anyres_vlm.model.vlm import VisionLanguageModel
from anyres_vlm.synthetic.dataset import write_dataset

logger = logging.getLogger(__name__)

INDEX_FILE = "index.parquet"


def index_samples(
    config: RunConfig, stage: StageName, output: Path, model: VisionLanguageModel, tokenizer: PreTrainedTokenizerFast
) -> IndexedSamples:
    """Index a stage's data beside the run, or where `data.index` says; an index that is up to date is not made again.

    Raises `DataError` for data that cannot be read or has too many rejects, `UsageError` for samples longer than the
    language model's sliding window, which the packed attention does not apply.
    """
    settings = config.stage(stage)
    path, images = _locate(settings.data, output, config.seed)
    template = settings.template or model.config.template
    conversation = ConversationTokenizer(template, tokenizer, settings.data.image_position)
    index = build_index(
        path,
        images,
        IndexSettings(conversation, model.tiling, settings.max_length),
        settings.data.index or output / stage / INDEX_FILE,
        workers=os.cpu_count() or 1,
        max_bad_fraction=settings.data.max_bad_fraction,
    ).index
    if rejects := count_rejects(index):
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in rejects.items())
        logger.warning(
            "%s: left out of %s records: %s; see %s", path, f"{len(index):,}", kinds, rejects_path(index.path)
        )
    window, longest = sliding_window(model.language_model.config), int(index.tokens[index.ok].max(initial=0))
    if window is not None and longest > window:
        raise UsageError(
            f"{stage}: the longest sample has {longest:,} tokens, but layers of {model.config.llm} attend to the last "
            f"{window:,} only, which is not supported: set {stage}.max_length={window} or choose another llm"
        )
    for change, count in index.changes.items():
        logger.info("%s: %s: %s", path, change, f"{count:,}")
    return IndexedSamples(open_source(path, images), index, conversation, model.tiling)


def _locate(data: DataConfig, output: Path, seed: int) -> tuple[Path, Path | None]:
    """The data and its image folder; the renderer's goes to `output/data` and is reused when it is there."""
    if data.rendered is None:
        assert data.path is not None, "validated by the configuration"
        return data.path, data.images
    assert data.samples is not None, "validated by the configuration"
    folder = output / "data" / data.rendered
    return write_dataset(folder, data.rendered, data.samples, seed, data.kinds), None
