"""Time of the training loop apart from forward, backward and optimizer, and time that steps wait for data.

Run as `tools/bench/step.py loop` or `--loop`: both stages of a real run of the embedded default. The loop's own work is
counts, logs, metrics and checkpoints. Targets: the loop takes 2% of the time, waiting 1%.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from anyres_vlm.config import load_config, shipped_config
from anyres_vlm.train.engine.plain import PlainBackend
from anyres_vlm.train.options import RunOptions
from anyres_vlm.train.run import train

QUICK = {"steps": 20}
WARM_UP = 5  # steps that are not counted, as the first ones allocate memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--steps", type=int, default=150, help=f"steps per stage; the first {WARM_UP} do not count")
    parser.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="override a key of the config"
    )


class Clock:
    """Adds up the time spent in the functions that it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the same function, timed."""

        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train both stages and split their time into work, waiting and the loop."""
    samples = [f"stage{stage}.data.samples={18 * arguments.steps}" for stage in (1, 2)]
    config = load_config(shipped_config("tiny"), [*samples, *arguments.settings])
    clock, marks = Clock(), {}

    def note(stage: str, step: int, total: int, numbers: dict[str, float]) -> None:
        marks.setdefault(stage, []).append((time.perf_counter(), clock.seconds, numbers["time/wait_s"]))

    work = {name: clock.around(getattr(PlainBackend, name)) for name in ("micro_step", "update")}
    with tempfile.TemporaryDirectory() as folder, patch.multiple(PlainBackend, **work):
        train(config, RunOptions(Path(folder), ("stage1", "stage2"), max_steps=arguments.steps), note)
    stages = {stage: _shares(rows[WARM_UP - 1 :]) for stage, rows in marks.items()}
    return {"stages": stages, "ratios": {f"{stage}, work alone": [row["work"]] for stage, row in stages.items()}}


def _shares(rows: list[tuple[float, float, float]]) -> dict[str, float]:
    """Return steps, seconds per step, and the shares of work, waiting and the rest, all after the first row."""
    (start, work_before, _), (end, work_after, _) = rows[0], rows[-1]
    total, work, wait = end - start, work_after - work_before, sum(wait for _, _, wait in rows[1:])
    return {
        "steps": len(rows) - 1,
        "step_s": total / (len(rows) - 1),
        "work": work / total,
        "wait": wait / total,
        "loop": 1 - (work + wait) / total,
    }


def show(figures: dict[str, Any]) -> None:
    """Print one line per stage."""
    print("stage   steps    s/step  forward, backward, optimizer  wait for data  loop; targets: wait 1%, loop 2%")
    for stage, row in figures["stages"].items():
        shares = f"{row['work']:28.2%}  {row['wait']:13.2%}  {row['loop']:4.2%}"
        print(f"{stage}  {row['steps']:5}  {row['step_s']:8.3f}  {shares}")
