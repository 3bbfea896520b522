"""What a run was started with: options, folders, the settings that decide a result, and signals that stop it.

Light to import: `anyres train` catches signals before it imports torch.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyres_vlm.config import CheckpointConfig, RunConfig, StageName

CONFIG_FILE = "config.yaml"
# Not part of what decides a result: where the index lies, and how DeepSpeed splits the same steps. The number of epochs
# decides how many steps there are, which checkpoints record themselves.
NOT_DECISIVE: Any = {"data": {"index": True}, "deepspeed": True}

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # Slurm's warning, a preemption, Kubernetes' eviction
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


def model_folder(output: Path, stage: StageName) -> Path:
    """Where a finished stage's checkpoint lies."""
    return output / stage / "model"


def stage_settings(config: RunConfig, stage: StageName) -> dict[str, Any]:
    """Return the settings that decide a stage's result; all others may change between two starts."""
    run = config.model_dump(mode="json", include={"model", "seed", "precision"})
    run["cache_features"] = config.cache_features is not None  # cached features are rounded; folder and size are free
    return {**run, **config.stage(stage).model_dump(mode="json", exclude=NOT_DECISIVE)}


def needs_stage_1(config: RunConfig, options: RunOptions) -> bool:
    """Whether stage 2 takes its projector from stage 1: a checkpoint has one, unless stage 1 trained it further."""
    if isinstance(config.model, CheckpointConfig) and not model_folder(options.output, "stage1").is_dir():
        return False
    return not options.skip_stage1


@contextmanager
def catch_signals() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM and SIGUSR1 set, instead of ending the process, while the block runs."""
    received = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # Python installs handlers in the main thread alone
        yield received
        return
    before = {number: signal.signal(number, lambda *_: received.set()) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def mark(output: Path, reason: str) -> None:
    """Leave the marker file: the run was interrupted and can be resumed."""
    (output / MARKER).write_text(reason + "\n", encoding="utf-8")


def unmark(output: Path) -> None:
    """Remove the marker file: the run has been started again."""
    (output / MARKER).unlink(missing_ok=True)
