"""Numbers of a run: one JSON object a step in `metrics.jsonl`, the same as TensorBoard events."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TextIO

from torch.utils.tensorboard import SummaryWriter

from anyres_vlm.train.engine.trackers import Tracker

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends `group/name` numbers by optimizer step; what a killed run wrote beyond the resumed step is taken back.

    Without a folder (ranks other than 0) nothing is written. `trackers` get the same numbers.
    """

    def __init__(self, folder: Path | None, first_step: int, trackers: Sequence[Tracker] = ()) -> None:
        self._trackers = trackers
        self._outputs: tuple[TextIO, SummaryWriter] | None = None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS_FILE
        if path.exists():
            kept = [json.dumps(row) + "\n" for row in read_metrics(path) if row["step"] <= first_step]
            shorter = path.with_suffix(".tmp")
            shorter.write_text("".join(kept), encoding="utf-8")
            shorter.replace(path)
        events = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        self._outputs = path.open("a", encoding="utf-8", buffering=1), events

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Record the numbers of one optimizer step, counted from 1."""
        if self._outputs is None:
            return
        rows, events = self._outputs
        rows.write(json.dumps({"step": step, **numbers}) + "\n")
        for name, number in numbers.items():
            events.add_scalar(name, number, step)
        for tracker in self._trackers:
            tracker.log(numbers, step=step)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for output in self._outputs or ():
            output.close()
        for tracker in self._trackers:
            tracker.finish()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """All rows of a `metrics.jsonl`; a last line that a kill cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            rows.append(json.loads(line))
    return rows
