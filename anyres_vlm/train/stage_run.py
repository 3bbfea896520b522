"""One stage of a run: its data, model and plan put together, trained, checkpointed and finished."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from transformers import PreTrainedTokenizerFast

from anyres_vlm.config import RunConfig, StageName
from anyres_vlm.data.chat_template import chat_jinja
from anyres_vlm.data.conversation import ConversationTokenizer
from anyres_vlm.data.index.table import Index, read_index
from anyres_vlm.data.loader import iter_steps
from anyres_vlm.data.packing.cost import CostModel, derive_cost
from anyres_vlm.errors import DataError, Interrupted
from anyres_vlm.model.card import write_card
from anyres_vlm.model.feature_cache import FeatureCache
from anyres_vlm.model.hub import build_model
from anyres_vlm.model.lora import add_lora, merged_weights, save_adapter
from anyres_vlm.model.pretrained import load_parts, save_pretrained
from anyres_vlm.model.vlm import VisionLanguageModel
from anyres_vlm.train import checkpoint
from anyres_vlm.train.card import stage_sections
from anyres_vlm.train.engine.deepspeed_settings import DeepSpeedSettings
from anyres_vlm.train.engine.engine import Engine, StepResult
from anyres_vlm.train.engine.trackers import start_trackers
from anyres_vlm.train.interruption import mark
from anyres_vlm.train.loop import run_steps
from anyres_vlm.train.metrics import METRICS_FILE, MetricsWriter
from anyres_vlm.train.optim import build_optimizer, build_schedule
from anyres_vlm.train.options import CONFIG_FILE, RunOptions, model_folder, needs_stage_1, stage_settings
from anyres_vlm.train.samples import INDEX_FILE, index_samples
from anyres_vlm.train.saving import Saver
from anyres_vlm.train.stage import ADAPTER_PARTS, freeze, recipe_warnings, trained_rates
from anyres_vlm.train.steps import StageSteps, model_flops
from anyres_vlm.train.throughput import Throughput, device_peak

logger = logging.getLogger(__name__)

Progress = Callable[[StageName, int, int, dict[str, float]], None]
"""Called after each optimizer step with the stage, the finished steps, all steps and the step's numbers."""


class StageRun:
    """Everything one stage holds while it trains; `run` is the order of events."""

    def __init__(
        self,
        engine: Engine,
        config: RunConfig,
        options: RunOptions,
        stage: StageName,
        deepspeed: DeepSpeedSettings | None,
        progress: Progress,
    ) -> None:
        self.engine, self.config, self.options, self.stage, self.progress = engine, config, options, stage, progress
        self.settings = config.stage(stage)
        self.rates = trained_rates(config, stage)
        self.folder = options.output / stage
        self.num_skipped = 0
        self.deepspeed = deepspeed
        self.model, self.tokenizer = self._build_model()
        self.model.cached_features = self.cache = self._open_cache()
        with engine.main_first():
            self.samples = index_samples(config, stage, options.output, self.model, self.tokenizer)
        self.flops = model_flops(self.model)
        cost = CostModel() if self.flops is None else derive_cost(self.flops)
        self.steps = StageSteps.plan(self.samples.index, config, stage, cost, options.max_steps)
        self.optimizer = build_optimizer(self.model, self.rates, self.settings.weight_decay)
        self.saver = Saver(self.folder / "checkpoints", self._write_model, config.keep_checkpoints, config.save_minutes)

    def run(self) -> None:
        """Resume or begin, train the steps that are left, save the finished model.

        Raises `Interrupted` after a signal, with the state saved; `DataError` when too many steps are not finite.
        """
        finished = self._prepare()
        schedule = build_schedule(self.optimizer, self.settings, len(self.steps), finished)
        self._announce(finished)
        batches = iter_steps(
            self.samples,
            self.steps.shares(finished, self.engine.rank, self.engine.world_size),
            self.settings.data,
            self.config.seed,
            workers=self.config.workers,
            pin_memory=self.engine.is_cuda,
        )
        log = self._open_log(finished)
        throughput = Throughput(self.flops, self.rates, device_peak(), self.engine.world_size)
        seed = self.config.seed
        with log:

            def asks() -> tuple[bool, bool]:
                return self.options.is_signalled(), self.engine.is_main and self.saver.is_due

            for step, result, numbers in run_steps(self.engine, batches, schedule, seed, finished, throughput, asks):
                log.write(step, numbers | self._cache_counts())
                if self.engine.is_main:
                    self.progress(self.stage, step, len(self.steps), numbers)
                self._cap_skipped(step, result)
                if step < len(self.steps) and (result.stop or result.save or step % self.config.save_every == 0):
                    self._save_checkpoint(step)
                    if result.stop:
                        self._leave(step)
        self._save_model()

    def _open_log(self, finished: int) -> MetricsWriter:
        if not self.engine.is_main:
            return MetricsWriter(None, finished)
        trackers = start_trackers(self.config.trackers, self.folder, self.config.model_dump(mode="json"))
        return MetricsWriter(self.folder, finished, trackers)

    def _build_model(self) -> tuple[VisionLanguageModel, PreTrainedTokenizerFast]:
        # DeepSpeed takes its fp32 masters from weights that were cast: to read those halves what the host holds.
        is_cast = self.deepspeed is not None and self.config.precision == "bf16"
        dtype = torch.bfloat16 if is_cast else torch.float32
        model, tokenizer = build_model(self.config.model, self.config.seed, dtype)
        if self.stage == "stage2" and needs_stage_1(self.config, self.options):
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

    def _prepare(self) -> int:
        """Hand the model to the engine, as it was at the newest checkpoint. Returns the finished steps."""
        resumed = checkpoint.latest(self.folder / "checkpoints")
        if resumed is None:
            self.engine.prepare(self.model, self.optimizer, self.settings.max_grad_norm, self.deepspeed)
            return 0
        folder, state = resumed
        checkpoint.require_same_settings(folder, state.settings, self._fixed_settings())
        with checkpoint.tensors(folder) as read:
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    parameter.data.copy_(read(name))
            self.engine.prepare(self.model, self.optimizer, self.settings.max_grad_norm, self.deepspeed)
            self.engine.restore(state.updates, read)
        return state.step

    def _cap_skipped(self, step: int, result: StepResult) -> None:
        self.num_skipped += result.is_skipped
        if self.num_skipped > self.config.max_skipped_steps:
            raise DataError(
                f"{self.stage}: {self.num_skipped} steps were not finite, the last one step {step}: look at the "
                "samples named above, lower learning_rate, or raise max_skipped_steps"
            )

    def _leave(self, step: int) -> NoReturn:
        reason = f"{self.stage} is saved after step {step} of {len(self.steps)}: the same command goes on"
        if self.engine.is_main:
            self.saver.finish()
            mark(self.options.output, reason)
        self.engine.wait()
        raise Interrupted(reason)

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
        snapshot = self.engine.snapshot()
        if self.engine.is_main:
            self.saver.save(snapshot, step, self._fixed_settings())

    def _save_model(self) -> None:
        weights = self.engine.snapshot(with_moments=False).weights
        if self.engine.is_main:
            self.saver.finish()
            sections = stage_sections(self.options.output, self._stages())

            def fill(folder: Path) -> None:
                self._write_model(folder, weights)
                write_card(folder, self.model, sections)

            checkpoint.write_folder(model_folder(self.options.output, self.stage), fill)
        self.engine.wait()

    def _stages(self) -> dict[StageName, Index]:
        """The stages behind this model, as far as they ran here, with the indexes of their data."""
        stages = {self.stage: self.samples.index}
        first = self.options.output / "stage1"
        if self.stage == "stage1" or not needs_stage_1(self.config, self.options):
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
