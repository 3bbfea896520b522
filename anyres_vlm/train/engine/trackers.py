"""Trackers beside the run's own files: wandb and trackio, as accelerate drives them."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from anyres_vlm.errors import UsageError

PROJECT = "anyres-vlm"
ID_FILE = "tracker_id"  # in the stage's folder: a resumed stage goes on in the same tracked run


class Tracker(Protocol):
    """What is used of accelerate's trackers."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Record the numbers of an optimizer step."""

    def finish(self) -> None:
        """Send what is left."""


def require_trackers(names: Sequence[str]) -> None:
    """Raise `UsageError` for a tracker that is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise UsageError(f"trackers: {name} is not installed: pip install {name}")


def start_trackers(names: Sequence[str], folder: Path, settings: dict[str, Any]) -> list[Tracker]:
    """Open the run of a stage's folder in each tracker; its name is that of the output folder, the stage and an id."""
    if not names:
        return []
    id_file = folder / ID_FILE
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(4), encoding="utf-8")
    run = f"{folder.parent.resolve().name}-{folder.name}-{id_file.read_text(encoding='utf-8')}"
    trackers = []
    for name in names:
        identity = {"id": run, "dir": str(folder)} if name == "wandb" else {}
        tracker = LOGGER_TYPE_TO_CLASS[name](PROJECT, name=run, resume="allow", **identity)
        tracker.start()
        tracker.store_init_configuration(settings)
        trackers.append(tracker)
    return trackers
