"""What a run was started with: options, folders and the settings that decide a result. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anyres_vlm.config import CheckpointConfig, RunConfig, StageConfig, StageName, read_mapping
from anyres_vlm.train.signals import Watchdog

CONFIG_FILE = "config.yaml"
# Not part of what decides a result: where the index lies, and how DeepSpeed splits the same steps. The number of epochs
# decides how many steps there are, which checkpoints record themselves.
NOT_DECISIVE: Any = {"data": {"index": True}, "deepspeed": True}

MARKER = "interrupted"  # a file in the output folder: launchers replace the exit status, so job scripts look for it

Progress = Callable[[StageName, int, int, dict[str, float]], None]
"""Called after each optimizer step with the stage, the finished steps, all steps and the step's numbers."""


@dataclass(frozen=True)
class RunOptions:
    """What the command line decides in addition to the configuration."""

    output: Path
    stages: tuple[StageName, ...]
    resume: bool = True
    max_steps: int | None = None  # of each stage
    skip_stage1: bool = False
    is_signalled: Callable[[], bool] = lambda: False  # whether to save and stop after the current step
    watchdog: Watchdog = field(default_factory=Watchdog)  # ends the process if it does not stop after a signal


def model_folder(output: Path, stage: StageName) -> Path:
    """Where a finished stage's checkpoint lies."""
    return output / stage / "model"


def stage_settings(config: RunConfig, stage: StageName) -> dict[str, Any]:
    """Return the settings that decide a stage's result; all others may change between two starts."""
    run = config.model_dump(mode="json", include={"model", "seed", "precision"})
    run["cache_features"] = config.cache_features is not None  # cached features are rounded; folder and size are free
    settings = config.stage(stage).model_dump(mode="json", exclude=NOT_DECISIVE)
    if settings["data"]["image_position"] == "as_is":
        del settings["data"]["image_position"]  # runs of releases without the key had it so
    return {**run, **settings}


def as_begun(config: RunConfig, options: RunOptions) -> RunConfig:
    """Return the configuration with the defaults under which the stages in the output folder began.

    Older releases had no `data.image_position`, which is `as_is`, and a fixed `lora.alpha`. What the configuration sets
    itself stays.
    """
    changed: dict[str, StageConfig] = {}
    for name in options.stages:
        file = options.output / name / CONFIG_FILE
        if not options.resume or not file.exists():
            continue
        began, stage = read_mapping(file).get(name, {}), config.stage(name)
        updates: dict[str, Any] = {}
        if not ({"image_position"} & (began.get("data", {}).keys() | stage.data.model_fields_set)):
            updates["data"] = stage.data.model_copy(update={"image_position": "as_is"})
        lora = began.get("lora") or {}
        if stage.lora is not None and "alpha" in lora and "alpha" not in stage.lora.model_fields_set:
            updates["lora"] = stage.lora.model_copy(update={"alpha": lora["alpha"]})
        changed[name] = stage.model_copy(update=updates)
    return config.model_copy(update=changed)


def needs_stage_1(config: RunConfig, options: RunOptions) -> bool:
    """Whether stage 2 takes its projector from stage 1: a checkpoint has one, unless stage 1 trained it further."""
    if isinstance(config.model, CheckpointConfig) and not model_folder(options.output, "stage1").is_dir():
        return False
    return not options.skip_stage1


def mark(output: Path, reason: str) -> None:
    """Leave the marker file: the run was interrupted and can be resumed."""
    (output / MARKER).write_text(reason + "\n", encoding="utf-8")


def unmark(output: Path) -> None:
    """Remove the marker file: the run has been started again."""
    (output / MARKER).unlink(missing_ok=True)
