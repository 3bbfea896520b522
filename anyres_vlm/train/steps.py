"""What a stage learns from, and in which order: its indexed samples, and the optimizer steps planned over them."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import CLIPVisionConfig, PreTrainedTokenizerFast

from anyres_vlm.config import DataConfig, RunConfig, StageName
from anyres_vlm.data.conversation import ConversationTokenizer
from anyres_vlm.data.index.build import build_index
from anyres_vlm.data.index.rows import IndexSettings
from anyres_vlm.data.index.table import Index, Stamp, count_rejects, read_index, rejects_path
from anyres_vlm.data.loader import IndexedSamples, Pack
from anyres_vlm.data.packing.cost import CostModel, Flops, derive_cost, forward_flops
from anyres_vlm.data.packing.plan import Plan, plan_epoch
from anyres_vlm.data.packing.report import measure
from anyres_vlm.data.sources import open_source
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.model.attention import sliding_window
from anyres_vlm.model.encoder import ClipEncoder
from anyres_vlm.model.features import FeatureCache
from anyres_vlm.model.vlm import VisionLanguageModel
from anyres_vlm.synthetic.dataset import write_dataset
from anyres_vlm.train.agreement import agree
from anyres_vlm.train.checkpoint import DataFacts
from anyres_vlm.train.options import RunOptions

if TYPE_CHECKING:  # start-up time: `anyres estimate` plans without an engine
    from anyres_vlm.train.engine.engine import Engine

logger = logging.getLogger(__name__)

INDEX_FILE = "index.parquet"


def index_path(config: RunConfig, stage: StageName, output: Path) -> Path:
    """Where the index of a stage's data lies: in the run's folder, or where `data.index` says."""
    return config.stage(stage).data.index or output / stage / INDEX_FILE


def index_samples(
    engine: Engine,
    config: RunConfig,
    stage: StageName,
    output: Path,
    model: VisionLanguageModel,
    tokenizer: PreTrainedTokenizerFast,
) -> IndexedSamples:
    """Index a stage's data on rank 0, then read the index on the others; one that is up to date is used as it is.

    Raises `DataError` for data that cannot be read or has too many rejects, `UsageError` for samples longer than the
    language model's sliding window, which packed attention does not apply.
    """
    with engine.main_first():
        return _index_samples(config, stage, output, model, tokenizer)


def _index_samples(
    config: RunConfig, stage: StageName, output: Path, model: VisionLanguageModel, tokenizer: PreTrainedTokenizerFast
) -> IndexedSamples:
    settings = config.stage(stage)
    path, images = _locate(settings.data, output, config.seed)
    template = settings.template or model.config.template
    conversation = ConversationTokenizer(template, tokenizer, settings.data.image_position)
    index = build_index(
        path,
        images,
        IndexSettings(conversation, model.tiling, settings.max_length),
        index_path(config, stage, output),
        workers=os.cpu_count() or 1,
        max_bad_fraction=settings.data.max_bad_fraction,
    ).index
    if rejects := count_rejects(index):
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in rejects.items())
        logger.warning(
            "%s: left out of %s records: %s; see %s", path, f"{len(index):,}", kinds, rejects_path(index.path)
        )
    for change, count in index.changes.items():
        logger.info("%s: %s: %s", path, change, f"{count:,}")
    window, longest = sliding_window(model.language_model.config), int(index.tokens[index.ok].max(initial=0))
    if window is not None and longest > window:
        raise UsageError(
            f"{stage}: the longest sample has {longest:,} tokens, but layers of {model.config.llm} attend to the last "
            f"{window:,} only, which is not supported: set {stage}.max_length={window} or choose another llm"
        )
    return IndexedSamples(open_source(path, images), index, conversation, model.tiling)


def _locate(data: DataConfig, output: Path, seed: int) -> tuple[Path, Path | None]:
    """Return the data and its image folder; rendered data goes to `output/data` and is reused when it is there."""
    if data.rendered is None:
        assert data.path is not None, "validated by the configuration"
        return data.path, data.images
    assert data.samples is not None, "validated by the configuration"
    folder = output / "data" / data.rendered
    return write_dataset(folder, data.rendered, data.samples, seed, data.kinds), None


def indexed_data(path: Path) -> DataFacts | None:
    """Return the fingerprint and records of the data that an index was made of; None without a readable index."""
    try:
        source = read_index(path).metadata["source"]
        return {"fingerprint": str(source["fingerprint"]), "records": int(source["rows"])}
    except (DataError, KeyError, TypeError, ValueError):
        return None


def current_data(config: RunConfig, stage: StageName, output: Path) -> DataFacts | None:
    """Return the fingerprint and records of a stage's data as it is now, without a model.

    The data is read only if its files look different from when they were indexed. None for rendered data, which follows
    from the configuration, and for data that is no longer there.
    """
    data, index = config.stage(stage).data, index_path(config, stage, output)
    if data.path is None:
        return None
    try:
        known = Stamp.take(data.path, data.images).known_fingerprint(index)
        indexed = indexed_data(index)
        if known is not None and indexed is not None and indexed["fingerprint"] == known:
            return indexed
        source = open_source(data.path, data.images)
        return {"fingerprint": source.fingerprint(), "records": len(source)}
    except (DataError, OSError):
        return None


@dataclass(frozen=True)
class StageSteps:
    """All steps of a stage. `positions` are the good samples' in the index, which the plans number from 0."""

    positions: NDArray[np.int64]
    epochs: tuple[Plan, ...]
    max_steps: int | None

    @classmethod
    def plan(
        cls, index: Index, config: RunConfig, stage: StageName, flops: Flops | None, max_steps: int | None
    ) -> StageSteps:
        """Plan every epoch, packs balanced by cost. Raises `UsageError` for a sample above the capacity."""
        settings, positions = config.stage(stage), np.flatnonzero(index.ok)
        cost = CostModel() if flops is None else derive_cost(flops)
        epochs = tuple(
            plan_epoch(
                index.tokens[positions],
                index.tiles[positions],
                capacity=settings.capacity,
                batch_size=settings.batch_size,
                packs_per_step=settings.packs_per_step,
                seed=config.seed,
                epoch=epoch,
                cost=cost,
            )
            for epoch in range(settings.epochs)
        )
        return cls(positions, epochs, max_steps)

    @property
    def available(self) -> int:
        """The steps of all epochs, whatever `max_steps` is."""
        return sum(plan.num_steps for plan in self.epochs)

    def __len__(self) -> int:
        return self.available if self.max_steps is None else min(self.available, self.max_steps)

    def describe(self, world_size: int) -> tuple[str, tuple[str, ...]]:
        """Describe the first epoch's plan on so many ranks in a line, and advise where it could be better."""
        report = measure(self.epochs[0], world_size)
        line = (
            f"{report.packs_per_step} packs a step of up to {report.capacity:,} tokens, {report.efficiency:.1%} full; "
            f"{report.samples_per_step_mean:.1f} samples a step for a batch size of {report.batch_size}; "
            f"straggler factor {report.straggler:.3f} on {world_size} rank{'s' * (world_size > 1)}"
        )
        return line, report.advice

    @property
    def key(self) -> str:
        """Hash of what decides the sequence of steps; with a step's number it is the state to resume from."""
        return self.epochs[0].key

    def shares(self, first_step: int, rank: int, world_size: int) -> list[list[Pack]]:
        """Return the packs of one rank for each step from `first_step` on, one a micro-step."""
        every = [(epoch, plan, step) for epoch, plan in enumerate(self.epochs) for step in range(plan.num_steps)]
        return [
            [Pack(epoch, self.positions[rows]) for rows in plan.shares(step, world_size)[rank]]
            for epoch, plan, step in every[first_step : len(self)]
        ]


def model_flops(model: VisionLanguageModel) -> Flops | None:
    """Return the FLOPs of this model's parts; None for a language model that is not like Llama."""
    tower = model.vision_tower
    if isinstance(tower, ClipEncoder):
        vision = tower.vision_model.config
    else:  # a plain vision transformer, which CLIP's configuration can describe
        width = tower.width // len(tower.layers)
        vision = CLIPVisionConfig(
            hidden_size=width,
            num_attention_heads=1,  # must divide the width; the count does not change the FLOPs
            intermediate_size=4 * width,
            image_size=tower.tile,
            patch_size=tower.patch,
        )
    try:
        return forward_flops(model.language_model.config, vision, tower.layers)
    except UsageError as error:
        logger.info("packs are balanced by the costs of a 7B model: %s", error)
        return None


def plan_steps(
    engine: Engine, config: RunConfig, options: RunOptions, stage: StageName, index: Index, flops: Flops | None
) -> StageSteps:
    """Plan a stage's steps on every rank. Raises `UsageError` if the plans of two ranks differ."""
    steps = StageSteps.plan(index, config, stage, flops, options.max_steps)
    agree(engine, options.output, f"{len(steps)} steps of plan {steps.key[:16]} for {stage}")
    return steps


def open_cache(config: RunConfig, model: VisionLanguageModel) -> FeatureCache | None:
    """Give the model the run's cache of encoder features, if there is one."""
    settings = config.cache_features
    if settings is None:
        return None
    model.cached_features = FeatureCache(model.vision_tower, settings.folder, int(settings.max_gb * 1e9))
    return model.cached_features


def cache_counts(engine: Engine, cache: FeatureCache | None) -> dict[str, float]:
    """Hits and misses of the last step over all ranks."""
    if cache is None:
        return {}
    hits, misses = engine.sum(torch.tensor(cache.take_counts())).tolist()
    return {"cache/hits": hits, "cache/misses": misses}
