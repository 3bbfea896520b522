"""One stage of a run: build, index, plan, prepare; for each step fetch, step, log, save; finish."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
import yaml
from torch import Tensor
from torch.optim import AdamW
from transformers import PreTrainedTokenizerFast

from anyres_vlm.checkpoints.bases import build_model
from anyres_vlm.checkpoints.card import write_card
from anyres_vlm.checkpoints.load_save import end_tokens, save_pretrained
from anyres_vlm.checkpoints.weights import allocate, has_tied_head, load_parts
from anyres_vlm.config import RunConfig, StageConfig, StageName
from anyres_vlm.data.chat_template import chat_jinja
from anyres_vlm.data.conversation import ConversationTokenizer
from anyres_vlm.data.index.table import Index, read_index
from anyres_vlm.data.loader import IndexedSamples, iter_steps
from anyres_vlm.errors import DataError, Interrupted, UsageError
from anyres_vlm.model.features import FeatureCache
from anyres_vlm.model.kernels import apply_kernels
from anyres_vlm.model.lora import add_lora, merged_weights, save_adapter
from anyres_vlm.model.vlm import VisionLanguageModel
from anyres_vlm.schema import Batch
from anyres_vlm.train import checkpoint
from anyres_vlm.train.agreement import agree
from anyres_vlm.train.checkpoint import Finished, TrainerState
from anyres_vlm.train.engine.deepspeed_settings import DeepSpeedSettings
from anyres_vlm.train.engine.engine import Engine, start_trackers
from anyres_vlm.train.metrics import METRICS_FILE, Clock, MetricsWriter, Throughput, device_peak, step_numbers
from anyres_vlm.train.options import (
    CONFIG_FILE,
    Progress,
    RunOptions,
    mark,
    model_folder,
    needs_stage_1,
    stage_settings,
)
from anyres_vlm.train.recipe import (
    ADAPTER_PARTS,
    build_optimizer,
    build_schedule,
    freeze,
    recipe_warnings,
    recompute_activations,
    shrink_frozen,
    trained_rates,
)
from anyres_vlm.train.report import stage_sections
from anyres_vlm.train.saving import Saver, SaveSize, WriteModel, measure_save, require_disk, resume_point, try_saves
from anyres_vlm.train.steps import (
    StageSteps,
    cache_counts,
    index_path,
    index_samples,
    indexed_data,
    model_flops,
    open_cache,
    plan_steps,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """What the parts of a stage share: how the run was started, the model, its samples and its steps."""

    engine: Engine
    config: RunConfig
    options: RunOptions
    name: StageName
    model: VisionLanguageModel
    tokenizer: PreTrainedTokenizerFast
    samples: IndexedSamples
    steps: StageSteps

    @property
    def settings(self) -> StageConfig:
        """The configuration of the stage."""
        return self.config.stage(self.name)

    @property
    def folder(self) -> Path:
        """Where all of the stage is written."""
        return self.options.output / self.name

    def state(self, step: int, updates: int, stage1_steps: int | None) -> TrainerState:
        """What a checkpoint after this step records."""
        settings = stage_settings(self.config, self.name)
        settings |= {"plan": self.steps.key, "steps": len(self.steps)}
        return TrainerState(step, updates, settings, indexed_data(self.samples.index.path), stage1_steps)


def train_stage(
    engine: Engine,
    config: RunConfig,
    options: RunOptions,
    name: StageName,
    deepspeed: DeepSpeedSettings | None,
    done: Finished | None,
    progress: Progress,
) -> None:
    """Train a stage from its newest checkpoint or from the start, and save the model. `done` is set if it was finished.

    Raises `Interrupted` after a signal, with the state saved; `UsageError` if a checkpoint belongs to other settings or
    data; `DataError` if the model could not be saved at the end, or too many steps are not finite.
    """
    settings, rates = config.stage(name), trained_rates(config, name)
    is_split = deepspeed is not None
    outline, tokenizer = build(config, options, name, is_split=is_split, device=None)
    samples = index_samples(engine, config, name, options.output, outline, tokenizer)
    flops = model_flops(outline)
    steps = plan_steps(engine, config, options, name, samples.index, flops)
    stage = Stage(engine, config, options, name, outline, tokenizer, samples, steps)
    if done is not None and len(steps) <= done.steps:
        return record_finished(stage, done.steps, done.stage1_steps)

    model = load_model(engine, config, options, name, outline, is_split=is_split)
    stage = replace(stage, model=model)
    cache = open_cache(config, model)
    optimizer = build_optimizer(model, rates, settings.weight_decay)
    size = measure_save(model)
    before = prepare(stage, optimizer, deepspeed, done)
    first, stage1_steps = (0, stage_1_steps(stage)) if before is None else (before.step, before.stage1_steps)
    schedule = build_schedule(optimizer, settings, len(steps), first)
    announce(stage, before, cache)
    saver = Saver(stage.folder / "checkpoints", config.keep_checkpoints, config.save_minutes)
    options.watchdog.before_leaving = partial(resume_point, options, saver)
    throughput = Throughput(flops, rates, device_peak(), engine.world_size)
    num_skipped = 0
    with open_log(stage, first) as log:
        try_to_finish(stage, size, first)
        batches = fetch_steps(stage, first)
        clock = Clock()
        for step in range(first + 1, len(steps) + 1):
            clock.start()
            packs = next(batches)
            clock.fetched()
            rate = float(schedule.get_last_lr()[0])
            engine.seed(config.seed, step)
            result = engine.step(packs, stop=options.is_signalled(), save=engine.is_main and saver.is_due)
            schedule.step()
            clock.stepped()
            options.watchdog.stepped(clock.total_s)
            numbers = step_numbers(result, rate, clock) | throughput.rates(result, clock.total_s)
            log.write(step, numbers | cache_counts(engine, cache))
            if engine.is_main:
                progress(name, step, len(steps), numbers)
            num_skipped += result.is_skipped
            cap_skipped(stage, step, num_skipped)
            if step == len(steps) or result.stop or result.save or step % config.save_every == 0:
                save(stage, saver, step, stage1_steps)
            if result.stop and step < len(steps):
                leave(stage, saver, step)
    finish(stage, saver, stage1_steps)


def build(
    config: RunConfig, options: RunOptions, name: StageName, *, is_split: bool, device: torch.device | None
) -> tuple[VisionLanguageModel, PreTrainedTokenizerFast]:
    """Build the model as the stage starts from it, adapters added, frozen where the stage does not train it.

    Weights are read to the CPU, and quantised on the `device`; without one, parameters are on the meta device.
    """
    settings, rates = config.stage(name), trained_rates(config, name)
    read = device is not None
    # DeepSpeed takes its fp32 masters from cast weights anyway: reading them in bf16 halves the memory of the host.
    dtype = torch.bfloat16 if is_split and config.precision == "bf16" else torch.float32
    llm_dtype = torch.bfloat16 if settings.is_quantized else dtype
    model, tokenizer = build_model(config.model, config.seed, dtype, llm_dtype=llm_dtype, read=read)
    if read and name == "stage2" and needs_stage_1(config, options):
        load_parts(model, model_folder(options.output, "stage1"), ADAPTER_PARTS)
    model.image_position = settings.data.image_position
    generation = model.language_model.generation_config
    stops = ConversationTokenizer(model.config.template, tokenizer).stop_ids
    generation.eos_token_id = sorted({*stops, *end_tokens(generation)})
    if settings.lora is not None:
        add_lora(model, settings.lora, config.seed)
    apply_kernels(model.language_model, config.kernels)
    recompute_activations(model, settings.activation_checkpointing, rates)
    freeze(model, rates)
    shrink_frozen(model, config, name, dtype, device, is_split=is_split)
    return model, tokenizer


def load_model(
    engine: Engine,
    config: RunConfig,
    options: RunOptions,
    name: StageName,
    outline: VisionLanguageModel,
    *,
    is_split: bool,
) -> VisionLanguageModel:
    """Read the weights on rank 0; on the others, return the outline with memory that the engine will broadcast into.

    The outline has no tied head if rank 0 found that the weights hold another. With `lora.quantize` every rank reads,
    because the scales of packed weights are not broadcast.
    """
    if config.stage(name).is_quantized:
        return build(config, options, name, is_split=is_split, device=engine.device)[0]
    model = build(config, options, name, is_split=is_split, device=engine.device)[0] if engine.is_main else outline
    is_tied = engine.sum(torch.tensor(int(engine.is_main and has_tied_head(model)))).item() > 0
    if not engine.is_main:
        allocate(model, is_tied=is_tied)
    return model


def prepare(
    stage: Stage, optimizer: AdamW, deepspeed: DeepSpeedSettings | None, done: Finished | None
) -> TrainerState | None:
    """Hand the model to the engine as it was at the newest checkpoint, whose state is returned; None without one."""
    engine, settings = stage.engine, stage.settings
    resumed = checkpoint.latest(stage.folder / "checkpoints")
    step = "no whole checkpoint" if resumed is None else f"a whole checkpoint of step {resumed[1].step}"
    agree(engine, stage.options.output, step)
    if done is not None and (resumed is None or resumed[1].step < done.steps):
        raise UsageError(
            f"{stage.name} is finished after {done.steps} steps, {len(stage.steps)} are asked for, and its last "
            "checkpoint is not there (it was deleted, or an older version kept none): choose another --output, or "
            f"start from {model_folder(stage.options.output, stage.name)} with model.checkpoint"
        )
    if resumed is None:
        engine.prepare(stage.model, optimizer, settings.max_grad_norm, deepspeed)
        return None
    folder, state = resumed
    now = stage.state(state.step, state.updates, state.stage1_steps)
    checkpoint.require_same_data(folder, state.data, now.data)
    checkpoint.require_same_settings(folder, stage.name, state.settings, now.settings)
    if state.step > len(stage.steps):
        raise UsageError(
            f"{folder} is after step {state.step}, but {len(stage.steps)} steps are asked for: ask for more, or choose "
            "another --output"
        )
    with checkpoint.tensors(folder) as read:
        for name, parameter in stage.model.named_parameters():
            if parameter.requires_grad:
                parameter.data.copy_(read(name))
        engine.prepare(stage.model, optimizer, settings.max_grad_norm, deepspeed)
        engine.restore(state.updates, read)
    return state


def stage_1_steps(stage: Stage) -> int | None:
    """Return the steps of the stage 1 that this stage starts from; None for stage 1, and where it is not recorded."""
    if stage.name == "stage1" or not needs_stage_1(stage.config, stage.options):
        return None
    first = checkpoint.read_finished(stage.options.output / "stage1")
    return None if first is None else first.steps


def announce(stage: Stage, before: TrainerState | None, cache: FeatureCache | None) -> None:
    """Log what will be trained and known mistakes of the recipe; write the stage's configuration."""
    if not stage.engine.is_main:
        return
    steps, name = stage.steps, stage.name
    packs, advice = steps.describe(stage.engine.world_size)
    for warning in [*recipe_warnings(stage.config, name), *advice]:
        logger.warning(warning)
    trained = sum(p.numel() for p in stage.model.parameters() if p.requires_grad)
    logger.info(
        "%s: %s samples, %s tokens, %s steps, %.1f M parameters trained%s",
        name,
        f"{len(steps.positions):,}",
        f"{int(steps.epochs[0].tokens.sum()):,}",
        f"{len(steps):,}",
        trained / 1e6,
        f", resumed after step {before.step}" if before is not None else "",
    )
    planned = None if before is None else before.settings.get("steps")
    if before is not None and planned != len(steps):
        logger.info(
            "%s: %s steps were planned before, %d now: from step %d on, the learning rate follows the schedule of %d",
            name,
            planned,
            len(steps),
            before.step + 1,
            len(steps),
        )
    logger.info("%s: %s", name, packs)
    if cache is not None:
        announce_cache(stage, cache)
    (stage.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    content = yaml.safe_dump(stage.config.model_dump(mode="json"), sort_keys=False)
    (stage.folder / CONFIG_FILE).write_text(content, encoding="utf-8")


def announce_cache(stage: Stage, cache: FeatureCache) -> None:
    """Log how much of the stage's features the cache can hold."""
    tiles = int(stage.samples.index.tiles[stage.steps.positions].sum())
    need_gb, bound_gb = tiles * cache.tile_bytes / 1e9, cache.max_bytes / 1e9
    logger.info(
        "%s: features of %s tiles take up to %.2f GB; %s may hold %.2f GB%s",
        stage.name,
        f"{tiles:,}",
        need_gb,
        cache.root,
        bound_gb,
        f", {bound_gb / need_gb:.0%} of them: raise cache_features.max_gb" if need_gb > bound_gb else "",
    )
    if stage.settings.data.augment is not None:
        logger.warning("data.augment changes images in every epoch: cache_features finds only those left unchanged")


def open_log(stage: Stage, finished: int) -> MetricsWriter:
    """Open the stage's metrics on rank 0, cut back to the finished steps; elsewhere they go nowhere."""
    if not stage.engine.is_main:
        return MetricsWriter(None, finished)
    trackers = start_trackers(stage.config.trackers, stage.folder, stage.config.model_dump(mode="json"))
    return MetricsWriter(stage.folder, finished, trackers)


def try_to_finish(stage: Stage, size: SaveSize, finished: int) -> None:
    """Try dry on rank 0, before the first step, what `finish` will do. Raises `DataError` if it would fail."""
    if not stage.engine.is_main:
        return
    config, remaining = stage.config, len(stage.steps) - finished
    is_timed = config.save_minutes is not None
    num_saves = config.keep_checkpoints + 1 if is_timed else -(-remaining // config.save_every)
    require_disk(size, stage.folder, num_saves=num_saves, keep=config.keep_checkpoints)
    try_saves(size, stage.folder, finished_writer(stage), stage.state(finished, 0, None))


def fetch_steps(stage: Stage, first: int) -> Iterator[list[Batch]]:
    """Yield this rank's batches of each step after the first ones, loaded ahead of time."""
    engine, config = stage.engine, stage.config
    shares = stage.steps.shares(first, engine.rank, engine.world_size)
    return iter_steps(
        stage.samples,
        shares,
        stage.settings.data,
        config.seed,
        workers=config.workers,
        pin_memory=engine.is_cuda,
    )


def save(stage: Stage, saver: Saver, step: int, stage1_steps: int | None) -> None:
    """Start to write the checkpoint of a step on rank 0, from a copy that all ranks gather.

    The previous one must be complete first: two copies of a 7B model and its moments would take 168 GB.
    """
    with stage.options.watchdog.paused():
        if stage.engine.is_main:
            saver.finish()
        snapshot = stage.engine.snapshot()
        if stage.engine.is_main:
            saver.save(snapshot, stage.state(step, snapshot.updates, stage1_steps))


def cap_skipped(stage: Stage, step: int, num_skipped: int) -> None:
    """Raise `DataError` if more steps than allowed were not finite."""
    if num_skipped > stage.config.max_skipped_steps:
        raise DataError(
            f"{stage.name}: {num_skipped} steps were not finite, the last one step {step}: look at the samples named "
            "above, lower learning_rate, or raise max_skipped_steps"
        )


def leave(stage: Stage, saver: Saver, step: int) -> NoReturn:
    """Wait for the checkpoint, leave the marker for job scripts, and raise `Interrupted` on all ranks."""
    reason = f"{stage.name} is saved after step {step} of {len(stage.steps)}: rerun the same command to resume"
    with stage.options.watchdog.paused():
        if stage.engine.is_main:
            saver.finish()
            mark(stage.options.output, reason)
        stage.engine.wait()
    raise Interrupted(reason)


def finish(stage: Stage, saver: Saver, stage1_steps: int | None) -> None:
    """Save the finished model, and record the stage as finished."""
    with stage.options.watchdog.paused():
        if stage.engine.is_main:
            saver.finish()
        weights = stage.engine.weights()
        if stage.engine.is_main:
            write = finished_writer(stage)
            target = model_folder(stage.options.output, stage.name)
            checkpoint.write_folder(target, lambda folder: write(folder, weights))
        stage.engine.wait()
    record_finished(stage, len(stage.steps), stage1_steps)


def record_finished(stage: Stage, steps: int, stage1_steps: int | None) -> None:
    """Write the record that tells a later run what it need not train again."""
    if stage.engine.is_main:
        data = indexed_data(stage.samples.index.path)
        record = Finished(steps, stage.steps.available, stage.settings.epochs, data, stage1_steps)
        checkpoint.write_finished(stage.folder, record)
        logger.info(
            "%s is finished after %d steps: %s", stage.name, steps, model_folder(stage.options.output, stage.name)
        )
    stage.engine.wait()


def finished_writer(stage: Stage) -> WriteModel:
    """Return what fills the folder of the finished model with the weights it is given, its card included."""

    def write(folder: Path, weights: dict[str, Tensor]) -> None:
        if (lora := stage.settings.lora) is not None:
            save_adapter(stage.model, weights, folder)
            weights = merged_weights(weights, lora)
            if stage.settings.is_quantized:
                weights = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}
        chat_template = chat_jinja(stage.model.config.template, stage.tokenizer)
        save_pretrained(stage.model, weights, stage.tokenizer, chat_template, folder)
        write_card(folder, stage.model, stage_sections(stage.options.output, indexes(stage)))

    return write


def indexes(stage: Stage) -> dict[StageName, Index]:
    """Return the indexes of the stages that made this model, as far as they ran here."""
    stages: dict[StageName, Index] = {stage.name: stage.samples.index}
    first = stage.options.output / "stage1"
    if stage.name == "stage1" or not needs_stage_1(stage.config, stage.options):
        return stages
    index = index_path(stage.config, "stage1", stage.options.output)
    files = (index, first / CONFIG_FILE, first / METRICS_FILE)
    # Without them the card leaves stage 1 out, which is better than to save no model.
    return {"stage1": read_index(index), **stages} if all(file.exists() for file in files) else stages
