"""Checkpoints of a running stage: atomic, complete, and refused where they belong to another run.

A checkpoint is a model folder as `model.pretrained` writes it, plus `trainer/` with the optimizer, the schedule and
the position in the data. The position is the number of finished optimizer steps: the plan of the steps and the seeds of
their dropout are recomputed from the configuration.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from anyres_vlm.errors import DataError, UsageError

logger = logging.getLogger(__name__)

PREFIX = "step-"


@dataclass(frozen=True)
class TrainerState:
    """What resumes a stage: finished optimizer steps and the settings that fix the sequence of steps."""

    step: int
    settings: dict[str, Any]


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder appear complete or not at all: written beside, flushed to disk, renamed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    fill(partial)
    for path in [*partial.rglob("*"), partial]:
        _flush(path)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    _flush(folder.parent)


def save_trainer(folder: Path, state: TrainerState, optimizer: AdamW, schedule: LambdaLR) -> None:
    """Write `trainer/` into a checkpoint folder that is being filled."""
    trainer = folder / "trainer"
    trainer.mkdir()
    torch.save(
        {
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
        },
        trainer / "state.pt",
    )
    (trainer / "state.json").write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")


def restore_trainer(folder: Path, settings: dict[str, Any], optimizer: AdamW, schedule: LambdaLR) -> int:
    """Load `trainer/` of this run's own checkpoint; returns the finished steps.

    Raises `UsageError` if the run's settings differ from the checkpoint's, `DataError` if its files are broken.
    """
    try:
        content = json.loads((folder / "trainer" / "state.json").read_text(encoding="utf-8"))
        state = TrainerState(step=content["step"], settings=content["settings"])
        tensors = torch.load(folder / "trainer" / "state.pt", map_location="cpu", weights_only=True)
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise DataError(f"{folder}: cannot resume from it ({error}); delete it to resume from the one before") from None
    require_same_settings(folder, state.settings, settings)
    optimizer.load_state_dict(tensors["optimizer"])
    schedule.load_state_dict(tensors["schedule"])
    return state.step


def require_same_settings(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises `UsageError` if a folder was written by a run of other settings."""
    for key in sorted(now):
        if now[key] != before.get(key):
            raise UsageError(
                f"{folder} was written with {key}={before.get(key)!r}, now it is {now[key]!r}: "
                "go on with the same settings or choose another --output"
            )


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in a folder of checkpoints."""
    found = sorted(folder.glob(f"{PREFIX}*"), key=_step) if folder.is_dir() else []
    return found[-1] if found else None


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"{PREFIX}{step:07d}"


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for old in sorted(folder.glob(f"{PREFIX}*"), key=_step)[:-keep]:
        shutil.rmtree(old)
        logger.debug("deleted %s", old)


def _step(path: Path) -> int:
    return int(path.name.removeprefix(PREFIX))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
