"""Training in this process that ends at a step, as if the process had been killed there."""

from __future__ import annotations

from collections.abc import Sequence

from accelerate.state import AcceleratorState

from anyres_vlm.config import load_config, shipped_config
from anyres_vlm.train.options import RunOptions
from anyres_vlm.train.run import train


class Killed(Exception):
    """Raised in the middle of a run, where a kill would end it."""


def train_here(settings: Sequence[str], options: RunOptions, killed_after: int | None = None) -> None:
    """Train the embedded default with settings. Raises `Killed` after a step."""
    AcceleratorState._reset_state(reset_partial_state=True)

    def progress(_stage: str, step: int, *_rest: object) -> None:
        if step == killed_after:
            raise Killed

    train(load_config(shipped_config("tiny"), settings), options, progress)
