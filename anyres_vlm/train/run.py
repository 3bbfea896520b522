"""One run: its stages in order, each from where it was left."""

from __future__ import annotations

import logging
from contextlib import closing
from functools import partial

from anyres_vlm.config import RunConfig, StageName, load_config
from anyres_vlm.errors import UsageError
from anyres_vlm.model.kernels import require_kernels
from anyres_vlm.model.quantize import require_bitsandbytes
from anyres_vlm.train import checkpoint
from anyres_vlm.train.agreement import STALE_S, agree, describe_stages, require_shared
from anyres_vlm.train.checkpoint import Finished
from anyres_vlm.train.engine.engine import Engine, require_trackers
from anyres_vlm.train.engine.ranks import telling_lost_ranks
from anyres_vlm.train.metrics import METRICS_FILE, read_metrics
from anyres_vlm.train.options import (
    CONFIG_FILE,
    Progress,
    RunOptions,
    as_begun,
    model_folder,
    needs_stage_1,
    stage_settings,
    unmark,
)
from anyres_vlm.train.saving import resume_point
from anyres_vlm.train.stage import train_stage
from anyres_vlm.train.steps import INDEX_FILE, current_data, indexed_data

logger = logging.getLogger(__name__)


def train(config: RunConfig, options: RunOptions, progress: Progress) -> bool:
    """Run the stages in order. A finished stage is left as it is, or trained further if more steps are asked for.

    Returns whether this process is the one that reports, rank 0; only there is `progress` called.

    Raises `UsageError` for stage 2 without a stage-1 projector, an output folder of another run, settings of DeepSpeed
    that contradict the run, and a tracker or kernels that are not installed; `DataError` for data that cannot be used
    and what could not be saved; `Interrupted` after a signal; `RankLost` if another rank is gone.
    """
    require_trackers(config.trackers)
    require_kernels(config.kernels)
    if config.stage2.is_quantized and "stage2" in options.stages:
        require_bitsandbytes("stage2.lora.quantize=nf4")
    minutes = config.rank_timeout_minutes
    with telling_lost_ranks(minutes), closing(Engine.start(config.precision, minutes)) as engine:
        require_shared(engine, options.output)
        agree(engine, options.output, partial(describe_stages, options.output), STALE_S)
        unmark(options.output)
        config = as_begun(config, options)
        options.watchdog.before_leaving = partial(resume_point, options)
        deepspeed = {stage: engine.read_deepspeed(config, stage) for stage in options.stages}
        for stage in options.stages:
            agree(engine, options.output, partial(describe_stages, options.output), STALE_S)
            done = finished_stage(config, options, stage) if options.resume else None
            if stage == "stage2" and engine.is_main:
                _warn_of_earlier_stage_1(options)
            if done is not None and not may_ask_for_more(done, config, options, stage):
                logger.info("%s is finished after %d steps: %s", stage, done.steps, model_folder(options.output, stage))
                if options.max_steps is not None and options.max_steps > done.steps:
                    logger.info("%s: its data has no more steps: raise %s.epochs (now %d)", stage, stage, done.epochs)
                continue
            _check_start(config, options, stage)
            train_stage(engine, config, options, stage, deepspeed[stage], done, progress)
            if stage == "stage1" and "stage2" not in options.stages and engine.is_main:
                _warn_of_earlier_stage_1(options, before=done)
        return engine.is_main


def finished_stage(config: RunConfig, options: RunOptions, stage: StageName) -> Finished | None:
    """Return what is recorded of a finished stage; None for one that is not.

    Raises `UsageError` if it was trained with other settings or data.
    """
    folder = options.output / stage
    if not model_folder(options.output, stage).is_dir():
        return None
    before = as_begun(load_config(folder / CONFIG_FILE), options)
    checkpoint.require_same_settings(folder, stage, stage_settings(before, stage), stage_settings(config, stage))
    done = checkpoint.read_finished(folder)
    if done is None:  # a version that kept no record: its other files tell as much
        metrics = folder / METRICS_FILE
        rows = read_metrics(metrics) if metrics.exists() else []
        epochs = before.stage(stage).epochs
        done = Finished(int(rows[-1]["step"]) if rows else 0, None, epochs, indexed_data(folder / INDEX_FILE))
    now = current_data(config, stage, options.output)
    # Fingerprints of different versions may differ for equal data: without a record, only the count is compared.
    if done.available is not None or (done.data and now and done.data["records"] != now["records"]):
        checkpoint.require_same_data(folder, done.data, now)
    return done


def may_ask_for_more(done: Finished, config: RunConfig, options: RunOptions, stage: StageName) -> bool:
    """Whether more steps are asked of a finished stage, as far as this can be told without its plan."""
    if done.steps == 0 or (options.max_steps is not None and options.max_steps <= done.steps):
        return False
    if done.available is not None and config.stage(stage).epochs == done.epochs:
        return min(options.max_steps or done.available, done.available) > done.steps
    return True


def _check_start(config: RunConfig, options: RunOptions, stage: StageName) -> None:
    if not options.resume and (options.output / stage).exists():
        raise UsageError(f"{options.output / stage} exists: resume it with --resume auto, or choose another --output")
    first = model_folder(options.output, "stage1")
    if stage == "stage2" and needs_stage_1(config, options) and not first.is_dir():
        raise UsageError(
            f"stage 2 needs the projector of stage 1, and {first} does not exist: run --stage 1 with the same --output "
            "first, or pass --skip-stage1 for the ablation without it"
        )


def _warn_of_earlier_stage_1(options: RunOptions, before: Finished | None = None) -> None:
    """Warn if stage 2 started from stage 1 as it was before it was trained further (from `before`, where known)."""
    folder = options.output / "stage2"
    first, second = checkpoint.read_finished(options.output / "stage1"), checkpoint.read_finished(folder)
    state = checkpoint.latest(folder / "checkpoints") if second is None else None
    started_from = second.stage1_steps if second is not None else state[1].stage1_steps if state is not None else None
    if started_from is None and before is not None and (folder / "checkpoints").is_dir():
        started_from = before.steps
    if first is not None and started_from is not None and started_from != first.steps:
        logger.warning(
            "stage2 was trained on stage 1 as it was after %d steps, stage 1 has %d now: delete %s or choose another "
            "--output to train stage 2 on it",
            started_from,
            first.steps,
            folder,
        )
