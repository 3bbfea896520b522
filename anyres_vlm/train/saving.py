"""Checkpoints written while training goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from anyres_vlm.model.lora import is_adapter
from anyres_vlm.train import checkpoint
from anyres_vlm.train.engine.state import Snapshot

WriteModel = Callable[[Path, dict[str, Tensor]], None]
"""Fills an existing folder with the model whose weights are given."""


class Saver:
    """Writes one checkpoint at a time on a thread, and prunes old ones. Training goes on: a snapshot is a copy."""

    def __init__(self, folder: Path, write_model: WriteModel, keep: int, every_minutes: float | None) -> None:
        self._folder, self._write_model, self._keep = folder, write_model, keep
        self._every_s = None if every_minutes is None else 60 * every_minutes
        self._last_s = time.monotonic()
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[None] | None = None

    @property
    def is_due(self) -> bool:
        """Whether more than the minutes between two checkpoints have gone by."""
        return self._every_s is not None and time.monotonic() - self._last_s > self._every_s

    def save(self, snapshot: Snapshot, step: int, settings: dict[str, object]) -> None:
        """Begin to write the checkpoint of a step; raises what the one before failed with, a full disk above all."""
        self.finish()
        self._last_s = time.monotonic()
        self._writing = self._thread.submit(
            self._write, snapshot, checkpoint.TrainerState(step, snapshot.updates, settings)
        )

    def finish(self) -> None:
        """Wait until the last checkpoint is whole. Raises what it failed with."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _write(self, snapshot: Snapshot, state: checkpoint.TrainerState) -> None:
        def fill(folder: Path) -> None:
            self._write_model(folder, snapshot.weights)
            adapter = {name: tensor for name, tensor in snapshot.weights.items() if is_adapter(name)}
            checkpoint.save_trainer(folder, state, {**snapshot.moments, **adapter})

        checkpoint.write_folder(checkpoint.checkpoint_path(self._folder, state.step), fill)
        checkpoint.prune(self._folder, self._keep)
