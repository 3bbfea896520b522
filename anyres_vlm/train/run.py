"""One run: its stages in order, each where it was left."""

from __future__ import annotations

import logging
from contextlib import closing

from anyres_vlm.config import RunConfig, StageName, load_config
from anyres_vlm.errors import UsageError
from anyres_vlm.train import checkpoint
from anyres_vlm.train.engine.engine import Engine
from anyres_vlm.train.engine.ranks import telling_lost_ranks
from anyres_vlm.train.engine.trackers import require_trackers
from anyres_vlm.train.interruption import unmark
from anyres_vlm.train.options import CONFIG_FILE, RunOptions, model_folder, needs_stage_1, stage_settings
from anyres_vlm.train.stage_run import Progress, StageRun

logger = logging.getLogger(__name__)


def train(config: RunConfig, options: RunOptions, progress: Progress) -> bool:
    """Run the stages in order; what is already finished in the output folder is left as it is.

    Returns whether this process is the one that reports, rank 0; only there is `progress` called.

    Raises `UsageError` for stage 2 without a stage-1 projector, an output folder of another run, and a tracker that is
    not installed; `Interrupted` after a signal; `RankLost` where another rank is gone.
    """
    require_trackers(config.trackers)
    minutes = config.rank_timeout_minutes
    with telling_lost_ranks(minutes), closing(Engine(config.precision, minutes)) as engine:
        unmark(options.output)
        deepspeed = {stage: engine.read_deepspeed(config, stage) for stage in options.stages}
        for stage in options.stages:
            if options.resume and model_folder(options.output, stage).is_dir():
                before = load_config(options.output / stage / CONFIG_FILE)
                settings = stage_settings(config, stage)
                checkpoint.require_same_settings(options.output / stage, stage_settings(before, stage), settings)
                logger.info("%s is finished: %s", stage, model_folder(options.output, stage))
            else:
                _check_start(config, options, stage)
                StageRun(engine, config, options, stage, deepspeed[stage], progress).run()
        return engine.is_main


def _check_start(config: RunConfig, options: RunOptions, stage: StageName) -> None:
    if not options.resume and (options.output / stage).exists():
        raise UsageError(f"{options.output / stage} exists: --resume auto goes on with it, or choose another --output")
    first = model_folder(options.output, "stage1")
    if stage == "stage2" and needs_stage_1(config, options) and not first.is_dir():
        raise UsageError(
            f"stage 2 needs the projector of stage 1, and {first} does not exist: run --stage 1 with the same --output "
            "first, or pass --skip-stage1 for the ablation without it"
        )
