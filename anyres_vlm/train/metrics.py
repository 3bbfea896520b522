"""Numbers of a run: one JSON object a step in `metrics.jsonl`, the same as TensorBoard events, and how fast it runs.

Rates are tokens and tiles a second and, where the device's peak is known, the share of it that is used (MFU).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

import torch

from anyres_vlm.data.packing.cost import Flops, training_flops

if TYPE_CHECKING:  # start-up time: `anyres estimate` reads the peaks alone
    from anyres_vlm.train.engine.engine import StepResult, Tracker

METRICS_FILE = "metrics.jsonl"
# Dense bf16 TFLOP/s with accumulation in fp32, by words of the device's name, from the makers' data sheets.
PEAKS = {
    "B200": 2250, "MI300X": 1307.4, "H200": 989.4, "H100 PCIe": 756, "H100 NVL": 835.5, "H100": 989.4, "H800": 989.4,
    "A100": 312, "A800": 312, "L40S": 362, "L4": 121, "A10G": 70, "A10": 125, "RTX 4090": 165.2,
}  # fmt: skip


@dataclass
class Clock:
    """Measures each step of a loop: waiting for its data, then training."""

    wait_s: float = 0.0
    step_s: float = 0.0
    _began_s: float = 0.0

    def start(self) -> None:
        """Start to wait for the data of a step."""
        self._began_s = time.monotonic()

    def fetched(self) -> None:
        """Note that the data of the step is there."""
        self.wait_s = self._lap()

    def stepped(self) -> None:
        """Note that the step is done."""
        self.step_s = self._lap()

    @property
    def total_s(self) -> float:
        """Seconds of the last step, wait included."""
        return self.wait_s + self.step_s

    def _lap(self) -> float:
        began, self._began_s = self._began_s, time.monotonic()
        return self._began_s - began


def step_numbers(result: StepResult, rate: float, clock: Clock) -> dict[str, float]:
    """Return the numbers of one optimizer step; NaN and infinity, which JSON lacks, are left out."""
    numbers = {
        "train/loss": result.loss,
        "train/grad_norm": result.grad_norm,
        "train/skipped": int(result.is_skipped),
        "train/learning_rate": rate,
        "data/tokens": result.tokens,
        "data/supervised_tokens": result.supervised_tokens,
        "data/tiles": result.tiles,
        "data/samples": result.samples,
        "data/rejects": result.rejects,
        "time/wait_s": round(clock.wait_s, 4),
        "time/step_s": round(clock.step_s, 4),
    }
    return {name: number for name, number in numbers.items() if math.isfinite(number)}


class MetricsWriter:
    """Appends `group/name` numbers by optimizer step; rows of a killed run after the resumed step are removed.

    Without a folder (ranks other than 0) nothing is written. `trackers` get the same numbers.
    """

    def __init__(self, folder: Path | None, first_step: int, trackers: Sequence[Tracker] = ()) -> None:
        self._trackers = trackers
        self._outputs: tuple[TextIO, Any] | None = None
        if folder is None:
            return
        from torch.utils.tensorboard import SummaryWriter  # start-up time

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
    """Read all rows of a `metrics.jsonl`; a last line that a kill cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            rows.append(json.loads(line))
    return rows


def device_peak() -> float | None:
    """Return the FLOP/s in bf16 of this rank's device; None on a CPU or a device that the table does not have."""
    if not torch.cuda.is_available():
        return None
    words = torch.cuda.get_device_name().replace("-", " ").split()
    return next((peak * 1e12 for name, peak in PEAKS.items() if _holds(words, name.split())), None)


def _holds(words: list[str], name: list[str]) -> bool:
    return any(words[first : first + len(name)] == name for first in range(len(words)))


@dataclass(frozen=True)
class Throughput:
    """Turns steps into rates; MFU needs the model's `flops` and the `device_peak`."""

    flops: Flops | None
    trained: Collection[str]  # parts of the model
    peak: float | None
    world_size: int

    def rates(self, result: StepResult, seconds: float) -> dict[str, float]:
        """Return the rates of one optimizer step over all ranks that took so long, data wait included."""
        seconds = max(seconds, 1e-9)
        rates = {
            "time/tokens_per_s": round(result.tokens / seconds, 1),
            "time/tiles_per_s": round(result.tiles / seconds, 2),
        }
        if self.flops is not None and self.peak is not None:
            done = training_flops(
                self.flops,
                self.trained,
                tokens=result.tokens,
                supervised_tokens=result.supervised_tokens,
                pairs=result.pairs,
                tiles=result.tiles,
            )
            rates["time/mfu"] = done / (seconds * self.world_size * self.peak)
        return rates
