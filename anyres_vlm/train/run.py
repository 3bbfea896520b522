"""One run: the data, model and plan of each stage put together, trained, checkpointed and finished."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedTokenizerFast

from anyres_vlm.config import CheckpointConfig, RunConfig, StageName, load_config
from anyres_vlm.data.chat_template import chat_jinja
from anyres_vlm.data.conversation import ConversationTokenizer
from anyres_vlm.data.index.table import Index, read_index
from anyres_vlm.data.loader import iter_steps
from anyres_vlm.errors import UsageError
from anyres_vlm.model.card import write_card
from anyres_vlm.model.feature_cache import FeatureCache
from anyres_vlm.model.hub import build_model
from anyres_vlm.model.lora import add_lora, load_adapter, merged_weights, save_adapter
from anyres_vlm.model.pretrained import load_parts, save_pretrained
from anyres_vlm.model.vlm import VisionLanguageModel
from anyres_vlm.train import checkpoint
from anyres_vlm.train.card import stage_sections
from anyres_vlm.train.engine import Engine
from anyres_vlm.train.loop import run_steps
from anyres_vlm.train.metrics import METRICS_FILE, MetricsWriter
from anyres_vlm.train.optim import build_optimizer, build_schedule
from anyres_vlm.train.samples import INDEX_FILE, index_samples
from anyres_vlm.train.stage import ADAPTER_PARTS, freeze, recipe_warnings, trained_rates
from anyres_vlm.train.steps import StageSteps, packing_cost

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"

Progress = Callable[[StageName, int, int, dict[str, float]], None]
"""Called after each optimizer step with the stage, the finished steps, all steps and the step's numbers."""


@dataclass(frozen=True)
class RunOptions:
    """What the command line decides beside the configuration."""

    output: Path
    stages: tuple[StageName, ...]
    resume: bool = True
    max_steps: int | None = None
    skip_stage1: bool = False


def model_folder(output: Path, stage: StageName) -> Path:
    """Where a finished stage's checkpoint lies."""
    return output / stage / "model"


def train(config: RunConfig, options: RunOptions, progress: Progress) -> bool:
    """Run the stages in order; what is already finished in the output folder is left as it is.

    Returns whether this process is the one that reports, rank 0; only there is `progress` called.

    Raises `UsageError` for stage 2 without a stage-1 projector, and for an output folder of another run.
    """
    engine = Engine(config.precision)
    try:
        for stage in options.stages:
            if options.resume and model_folder(options.output, stage).is_dir():
                before = load_config(options.output / stage / CONFIG_FILE)
                settings = stage_settings(config, stage)
                checkpoint.require_same_settings(options.output / stage, stage_settings(before, stage), settings)
                logger.info("%s is finished: %s", stage, model_folder(options.output, stage))
            else:
                _check_start(config, options, stage)
                StageRun(engine, config, options, stage, progress).run()
        return engine.is_main
    finally:
        engine.close()


def stage_settings(config: RunConfig, stage: StageName) -> dict[str, Any]:
    """What decides a stage's result; the rest of the configuration may change while it runs."""
    run = config.model_dump(mode="json", include={"model", "seed", "precision"})
    run["cache_features"] = config.cache_features is not None  # it rounds; where and how much is no matter
    return {**run, **config.stage(stage).model_dump(mode="json", exclude={"data": {"index"}})}  # a place, no content


def _needs_stage_1(config: RunConfig, options: RunOptions) -> bool:
    """Whether stage 2 takes its projector from stage 1: a checkpoint has one, unless stage 1 trained it further."""
    if isinstance(config.model, CheckpointConfig) and not model_folder(options.output, "stage1").is_dir():
        return False
    return not options.skip_stage1


def _check_start(config: RunConfig, options: RunOptions, stage: StageName) -> None:
    if not options.resume and (options.output / stage).exists():
        raise UsageError(f"{options.output / stage} exists: --resume auto goes on with it, or choose another --output")
    first = model_folder(options.output, "stage1")
    if stage == "stage2" and _needs_stage_1(config, options) and not first.is_dir():
        raise UsageError(
            f"stage 2 needs the projector of stage 1, and {first} does not exist: run --stage 1 with the same --output "
            "first, or pass --skip-stage1 for the ablation without it"
        )


class StageRun:
    """Everything one stage holds while it trains; `run` is the order of events."""

    def __init__(
        self, engine: Engine, config: RunConfig, options: RunOptions, stage: StageName, progress: Progress
    ) -> None:
        self.engine, self.config, self.options, self.stage, self.progress = (
            engine,
            config,
            options,
            stage,
            progress,
        )
        self.settings = config.stage(stage)
        self.rates = trained_rates(config, stage)
        self.folder = options.output / stage
        self.model, self.tokenizer = self._build_model()
        self.model.cached_features = self.cache = self._open_cache()
        with engine.main_first():
            self.samples = index_samples(config, stage, options.output, self.model, self.tokenizer)
        cost = packing_cost(self.model)
        self.steps = StageSteps.plan(self.samples.index, config, stage, cost, options.max_steps)
        self.optimizer = build_optimizer(self.model, self.rates, self.settings.weight_decay)
        self.schedule = build_schedule(self.optimizer, self.settings, len(self.steps))

    def run(self) -> None:
        """Resume or begin, train the steps that are left, save the finished model."""
        finished = self._restore()
        self.engine.prepare(self.model, self.optimizer)
        self._announce(finished)
        batches = iter_steps(
            self.samples,
            self.steps.shares(finished, self.engine.rank, self.engine.world_size),
            self.settings.data,
            self.config.seed,
            workers=self.config.workers,
            pin_memory=self.engine.is_cuda,
        )
        with MetricsWriter(self.folder if self.engine.is_main else None, finished) as metrics:

            def after_step(step: int, numbers: dict[str, float]) -> None:
                numbers |= self._cache_counts()
                metrics.write(step, numbers)
                if self.engine.is_main:
                    self.progress(self.stage, step, len(self.steps), numbers)
                if step % self.config.save_every == 0 and step < len(self.steps):
                    self._save_checkpoint(step)

            run_steps(
                self.engine, batches, self.schedule, self.settings.max_grad_norm, finished, after_step, self.config.seed
            )
        self._save_model()

    def _build_model(self) -> tuple[VisionLanguageModel, PreTrainedTokenizerFast]:
        model, tokenizer = build_model(self.config.model, self.config.seed)
        if self.stage == "stage2" and _needs_stage_1(self.config, self.options):
            load_parts(model, model_folder(self.options.output, "stage1"), ADAPTER_PARTS)
        stops = ConversationTokenizer(model.config.template, tokenizer).stop_ids
        model.language_model.generation_config.eos_token_id = stops
        if self.settings.lora is not None:
            add_lora(model, self.settings.lora, self.config.seed)
        if self.settings.activation_checkpointing:
            model.language_model.activation_checkpointing_enable()
        freeze(model, self.rates)
        return model, tokenizer

    def _open_cache(self) -> FeatureCache | None:
        cache = self.config.cache_features
        return None if cache is None else FeatureCache(self.model.vision_tower, cache.folder, int(cache.max_gb * 1e9))

    def _cache_counts(self) -> dict[str, float]:
        if self.cache is None:
            return {}
        hits, misses = self.engine.sum(torch.tensor(self.cache.take_counts())).tolist()
        return {"cache/hits": hits, "cache/misses": misses}

    def _fixed_settings(self) -> dict[str, Any]:
        """What must not change between a checkpoint and its resumption: it decides the sequence of steps."""
        return {**stage_settings(self.config, self.stage), "plan": self.steps.key, "steps": len(self.steps)}

    def _restore(self) -> int:
        resumed = checkpoint.latest(self.folder / "checkpoints")
        if resumed is None:
            return 0
        finished = checkpoint.restore_trainer(resumed, self._fixed_settings(), self.optimizer, self.schedule)
        load_parts(self.model, resumed, tuple(self.rates))
        if self.settings.lora is not None:
            load_adapter(self.model, resumed)
        return finished

    def _announce(self, finished: int) -> None:
        if not self.engine.is_main:
            return
        packs, advice = self.steps.describe(self.engine.world_size)
        for warning in [*recipe_warnings(self.config, self.stage), *advice]:
            logger.warning(warning)
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        logger.info(
            "%s: %s samples, %s tokens, %s steps, %.1f M parameters trained%s",
            self.stage,
            f"{len(self.steps.positions):,}",
            f"{int(self.steps.epochs[0].tokens.sum()):,}",
            f"{len(self.steps):,}",
            trained / 1e6,
            f", resumed after step {finished}" if finished else "",
        )
        logger.info("%s: %s", self.stage, packs)
        if self.cache is not None:
            self._announce_cache(self.cache)
        self.folder.mkdir(parents=True, exist_ok=True)
        content = yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False)
        (self.folder / CONFIG_FILE).write_text(content, encoding="utf-8")

    def _announce_cache(self, cache: FeatureCache) -> None:
        tiles = int(self.samples.index.tiles[self.steps.positions].sum())
        need_gb, bound_gb = tiles * cache.tile_bytes / 1e9, cache.max_bytes / 1e9
        logger.info(
            "%s: features of %s tiles take up to %.2f GB; %s may hold %.2f GB%s",
            self.stage,
            f"{tiles:,}",
            need_gb,
            cache.root,
            bound_gb,
            f", {bound_gb / need_gb:.0%} of them: raise cache_features.max_gb" if need_gb > bound_gb else "",
        )
        if self.settings.data.augment is not None:
            logger.warning(
                "data.augment changes images in every epoch: cache_features finds only those that it left alone"
            )

    def _save_checkpoint(self, step: int) -> None:
        state = checkpoint.TrainerState(step, self._fixed_settings())

        def fill(folder: Path) -> None:
            self._write_model(folder, weights)
            checkpoint.save_trainer(folder, state, self.optimizer, self.schedule)

        weights = self.engine.weights()
        if self.engine.is_main:
            checkpoint.write_folder(checkpoint.checkpoint_path(self.folder / "checkpoints", step), fill)
            checkpoint.prune(self.folder / "checkpoints", self.config.keep_checkpoints)
        self.engine.wait()

    def _save_model(self) -> None:
        weights = self.engine.weights()
        if self.engine.is_main:
            target = model_folder(self.options.output, self.stage)
            sections = stage_sections(self.options.output, self._stages())

            def fill(folder: Path) -> None:
                self._write_model(folder, weights)
                write_card(folder, self.model, sections)

            checkpoint.write_folder(target, fill)
        self.engine.wait()

    def _stages(self) -> dict[StageName, Index]:
        """The stages behind this model, as far as they ran here, with the indexes of their data."""
        stages = {self.stage: self.samples.index}
        first = self.options.output / "stage1"
        if self.stage == "stage1" or not _needs_stage_1(self.config, self.options):
            return stages
        index = self.config.stage1.data.index or first / INDEX_FILE
        files = (index, first / CONFIG_FILE, first / METRICS_FILE)
        # A card that is silent about stage 1 is better than no model.
        return {"stage1": read_index(index), **stages} if all(file.exists() for file in files) else stages

    def _write_model(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        if self.settings.lora is not None:
            save_adapter(self.model, weights, folder)
            weights = merged_weights(weights, self.settings.lora)
        chat_template = chat_jinja(self.model.config.template, self.tokenizer)
        save_pretrained(self.model, weights, self.tokenizer, chat_template, folder)
