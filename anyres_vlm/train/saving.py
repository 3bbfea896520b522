"""Save during training, and try before the first step whether everything can be saved at the end."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from anyres_vlm.errors import DataError
from anyres_vlm.model.lora import is_adapter
from anyres_vlm.model.vlm import VisionLanguageModel
from anyres_vlm.train import checkpoint
from anyres_vlm.train.checkpoint import TrainerState
from anyres_vlm.train.engine.plain import MOMENTS, Snapshot
from anyres_vlm.train.options import RunOptions, mark

logger = logging.getLogger(__name__)

WriteModel = Callable[[Path, dict[str, Tensor]], None]
"""Fills an existing folder with the model whose weights are given."""
TRIAL = "trial"  # name of the folders of a dry run, which are deleted at once
MOMENT_BYTES = 4 * len(MOMENTS)


def resume_point(options: RunOptions, saver: Saver | None = None) -> str:
    """Complete the checkpoint being written, leave the marker for job scripts, and return where a rerun resumes."""
    if saver is not None:
        saver.finish()
    steps = {stage: checkpoint.newest_step(options.output / stage / "checkpoints") for stage in options.stages}
    saved = [f"{stage} after step {step}" for stage, step in steps.items() if step is not None]
    reason = "nothing was saved after the last checkpoint, " + (saved[-1] if saved else "and there is none yet")
    mark(options.output, reason)
    return f"{reason}; rerun the same command to {'resume' if saved else 'start again'}"


class Saver:
    """Writes one checkpoint at a time on a thread, and deletes old ones. Training continues: a snapshot is a copy."""

    def __init__(self, folder: Path, write_model: WriteModel, keep: int, every_minutes: float | None) -> None:
        self._folder, self._write_model, self._keep = folder, write_model, keep
        self._every_s = None if every_minutes is None else 60 * every_minutes
        self._last_s = time.monotonic()
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[None] | None = None

    @property
    def is_due(self) -> bool:
        """Whether more than the minutes between two checkpoints have passed."""
        return self._every_s is not None and time.monotonic() - self._last_s > self._every_s

    def save(self, snapshot: Snapshot, state: TrainerState) -> None:
        """Start to write a checkpoint. Raises what the previous one failed with, such as a full disk."""
        self.finish()
        self._last_s = time.monotonic()
        self._writing = self._thread.submit(self._write, snapshot, state)

    def finish(self) -> None:
        """Wait until the last checkpoint is complete. Raises what it failed with."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _write(self, snapshot: Snapshot, state: TrainerState) -> None:
        def fill(folder: Path) -> None:
            self._write_model(folder, snapshot.weights)
            adapter = {name: tensor for name, tensor in snapshot.weights.items() if is_adapter(name)}
            checkpoint.save_trainer(folder, state, {**snapshot.moments, **adapter})

        checkpoint.write_folder(checkpoint.checkpoint_path(self._folder, state.step), fill)
        checkpoint.prune(self._folder, self._keep)


@dataclass(frozen=True)
class SaveSize:
    """What a stage will save: one-element stand-ins for its weights, and bytes on disk."""

    stand_ins: dict[str, Tensor]
    model_bytes: int
    checkpoint_bytes: int


def measure_save(model: VisionLanguageModel) -> SaveSize:
    """Measure what will be saved of a model: trained weights in fp32, two moments each, all others as they are.

    Called before the engine splits the model. Tied weights share a stand-in as they share their storage.
    """
    trained = {name for name, part in model.named_parameters(remove_duplicate=False) if part.requires_grad}
    stand_ins: dict[str, Tensor] = {}
    shared: dict[int, Tensor] = {}
    model_bytes = extra = 0
    for name, tensor in model.state_dict().items():
        dtype = torch.float32 if name in trained else tensor.dtype
        is_new = tensor.data_ptr() not in shared
        stand_ins[name] = shared.setdefault(tensor.data_ptr(), torch.zeros([1] * tensor.ndim, dtype=dtype))
        if is_new:
            model_bytes += tensor.numel() * dtype.itemsize
            extra += tensor.numel() * (MOMENT_BYTES * (name in trained) + 4 * is_adapter(name))
    return SaveSize(stand_ins, model_bytes, model_bytes + extra)


def try_saves(size: SaveSize, folder: Path, write_model: WriteModel, state: TrainerState) -> None:
    """Save a checkpoint and the model dry: everything but the weights' sizes is as at the end of the stage.

    `folder` is the stage's. Raises `DataError`, one line, for whatever the save at the end would fail with.
    """

    def fill(trial: Path) -> None:
        write_model(trial, size.stand_ins)
        checkpoint.save_trainer(trial, state, {"moment": torch.zeros(1)})

    began = time.monotonic()
    try:
        for place in (folder / "checkpoints", folder):
            checkpoint.write_folder(place / TRIAL, fill if place == folder else lambda _: None)
            shutil.rmtree(place / TRIAL)
    except Exception as error:  # whatever it is, it would otherwise be raised after the last step
        shutil.rmtree(folder / TRIAL, ignore_errors=True)
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{folder.name}: the model could not be saved at the end, so nothing is trained: {reason}"
        ) from error
    logger.debug("a dry save took %.2f s", time.monotonic() - began)


def require_disk(size: SaveSize, folder: Path, *, num_saves: int, keep: int) -> None:
    """Raise `DataError` if checkpoints and model of a stage do not fit the free space of their disks.

    One checkpoint more than `keep` is there while the newest is written. What is there already will be replaced.
    """
    count = min(num_saves, keep + 1)
    checkpoints = folder / "checkpoints"
    there = sum(path.stat().st_size for path in checkpoints.rglob("*") if path.is_file())
    needs = {checkpoints: max(count * size.checkpoint_bytes - there, 0), folder: size.model_bytes}
    disks: dict[int, tuple[Path, int]] = {}
    for place, need in needs.items():
        device = os.stat(place).st_dev
        disks[device] = (place, need + disks.get(device, (place, 0))[1])
    for place, need in disks.values():
        free = shutil.disk_usage(place).free
        if free < need:
            raise DataError(
                f"{folder.name} needs {_size(need)} of disk at {place}, {_size(free)} are free: {count} checkpoints of "
                f"{_size(size.checkpoint_bytes)} and the model of {_size(size.model_bytes)}: make room, lower "
                f"keep_checkpoints={keep}, or choose another --output"
            )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
