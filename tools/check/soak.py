#!/usr/bin/env python3
"""A long run on two ranks, observed from outside: memory, open files and step time stay constant, no process is left.

    tools/check/soak.py                     2,000 steps of stage 2 of the embedded default, after a short stage 1
    tools/check/soak.py --steps 60          a short trial

`torchrun` starts the real command with its loader workers, metrics and checkpoints; the steps are small. Resident
memory, open files and CPU time of each rank and its workers are read from /proc every second. The steps after the
warm-up are split into tenths: memory is compared between the last and the first, CPU time per step by the slope through
all ten. Wall clock times are only printed, as other work on the machine affects them. The exit status is 1 if memory
grows by more than 2%, steps cost 5% more, files stay open or processes are left.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import psutil

from anyres_vlm.train.metrics import METRICS_FILE, read_metrics

ROOT = Path(__file__).resolve().parents[2]
RANKS = 2
MEMORY_LIMIT, TIME_LIMIT = 0.02, 0.05  # allowed growth from the first tenth to the last
LENGTH = 512  # tokens per pack, two packs per step: a sixth of the default
STEP_SAMPLES = 5  # samples per step, approximately
STAGE1_STEPS = 5
EVERY_S = 1.0


@dataclass(frozen=True)
class Sample:
    """One reading of a rank and its workers."""

    step: int  # finished steps of stage 2
    rank: int
    mb: float
    files: int
    cpu_s: float


def tenths(series: Sequence[float]) -> list[float]:
    """Return the medians of ten parts of equal length. Raises `ValueError` for fewer than ten values."""
    if len(series) < 10:
        raise ValueError(f"{len(series)} values after the warm-up, 10 are needed: raise --steps")
    edges = [len(series) * part // 10 for part in range(11)]
    return [statistics.median(series[start:end]) for start, end in pairwise(edges)]


def growth(series: Sequence[float]) -> float:
    """Return the relative growth from the median of the first tenth to that of the last."""
    medians = tenths(series)
    return medians[-1] / medians[0] - 1


def drift(series: Sequence[float]) -> float:
    """Return the relative growth by the median slope through the tenths, which tolerates other load in some of them."""
    medians = tenths(series)
    slopes = [(medians[b] - medians[a]) / (b - a) for a, b in combinations(range(10), 2)]
    return 9 * statistics.median(slopes) / statistics.median(medians)


def cpu_tenths(samples: Sequence[Sample]) -> list[float]:
    """Return CPU seconds per step in ten parts. Raises `ValueError` if a part has fewer than two steps."""
    first, last = samples[0].step, samples[-1].step
    edges = [bisect_left(samples, first + (last - first) * part / 10, key=lambda one: one.step) for part in range(11)]
    parts = [(samples[start], samples[end]) for start, end in pairwise(edges)]
    if any(start.step == end.step for start, end in parts):
        raise ValueError(f"steps {first} to {last} are too few for ten parts: raise --steps")
    return [(end.cpu_s - start.cpu_s) / (end.step - start.step) for start, end in parts]


def judge(samples: Sequence[Sample], step_s: Sequence[float], warm_up: int, left: int) -> dict[str, Any]:
    """Return the figures and the failures. `step_s` has one value per step; `left` processes outlived the run."""
    failures, ranks = [], []
    for rank in sorted({sample.rank for sample in samples}):
        own = [sample for sample in samples if sample.rank == rank and sample.step >= warm_up]
        memory, files = [sample.mb for sample in own], [sample.files for sample in own]
        ranks.append({"rank": rank, "samples": len(own), "mb": tenths(memory), "growth": growth(memory)})
        ranks[-1] |= {"files": tenths(files), "most_files": max(files), "cpu_s": cpu_tenths(own)}
        ranks[-1]["drift"] = drift(ranks[-1]["cpu_s"])
        if ranks[-1]["growth"] > MEMORY_LIMIT:
            failures.append(f"rank {rank}: memory grew by {growth(memory):.1%}, {MEMORY_LIMIT:.0%} are allowed")
        if tenths(files)[-1] > tenths(files)[0]:
            failures.append(f"rank {rank}: {tenths(files)[0]:g} files open at first, {tenths(files)[-1]:g} at the end")
        if ranks[-1]["drift"] > TIME_LIMIT:
            failures.append(
                f"rank {rank}: CPU time per step grew by {ranks[-1]['drift']:.1%}, {TIME_LIMIT:.0%} are allowed"
            )
    counted = step_s[warm_up:]
    if left:
        failures.append(f"{left} processes outlived the run")
    time_s = {"step_s": tenths(counted), "drift": drift(counted)}
    return {"steps": len(step_s), "warm_up": warm_up, "ranks": ranks, **time_s, "left": left, "failures": failures}


def read_ranks(launcher: psutil.Process, step: int) -> list[Sample]:
    """Read the children of the launcher. Returns nothing if one of them is starting or ending."""
    try:
        found = []
        for process in launcher.children():
            tree = [process, *process.children(recursive=True)]
            held = sum(each.memory_info().rss for each in tree) / 1e6
            rank = int(process.environ()["RANK"])
            ended_s = sum(process.cpu_times()[2:4])  # loader workers of earlier epochs
            cpu_s = ended_s + sum(sum(each.cpu_times()[:2]) for each in tree)
            found.append(Sample(step, rank, held, sum(each.num_fds() for each in tree), cpu_s))
        return found
    except (psutil.Error, KeyError):
        return []


def command(folder: Path, steps: int, stage: int) -> list[str]:
    """Return the command that runs one stage."""
    sets = {
        "max_length": LENGTH,
        "capacity": LENGTH,
        "packs_per_step": RANKS,
        "epochs": -(-steps * STEP_SAMPLES // 2000),
        "data.samples": 2500,
    }
    words = [word for name, value in sets.items() for word in ("--set", f"stage{stage}.{name}={value}")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    train = ["-m", "anyres_vlm", "train", "--output", str(folder), "--stage", str(stage), "--max-steps", str(steps)]
    return [*launcher, *train, *words]


def soak(folder: Path, steps: int) -> tuple[list[Sample], list[float], int]:
    """Run both stages; return samples, seconds per step and processes left. Raises `CalledProcessError`."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path}
    subprocess.run(command(folder, STAGE1_STEPS, 1), check=True, env=environment)
    rows, samples, seen = folder / "stage2" / METRICS_FILE, [], set()
    launched = subprocess.Popen(command(folder, steps, 2), env=environment)
    launcher = psutil.Process(launched.pid)
    while launched.poll() is None:
        time.sleep(EVERY_S)
        if step := len(read_metrics(rows)) if rows.exists() else 0:
            samples += read_ranks(launcher, step)
        try:
            seen.update(launcher.children(recursive=True))
        except psutil.NoSuchProcess:
            break
    if launched.wait():
        raise subprocess.CalledProcessError(launched.returncode, launched.args)
    _, left = psutil.wait_procs(seen, timeout=5)
    return samples, [row["time/step_s"] + row["time/wait_s"] for row in read_metrics(rows)], len(left)


def show(figures: dict[str, Any]) -> None:
    """Print one line of ten medians per series, and the verdict."""
    print(f"{figures['steps']:,} steps, {figures['warm_up']} of warm-up not counted; medians of tenths, and growth")
    for rank in figures["ranks"]:
        name = f"rank {rank['rank']}"
        print(f"{name}, MB    " + "".join(f"{mb:8.0f}" for mb in rank["mb"]) + f"{rank['growth']:+9.2%}")
        print(
            f"{name}, files " + "".join(f"{files:8.0f}" for files in rank["files"]) + f"  at most {rank['most_files']}"
        )
        print(f"{name}, CPU ms" + "".join(f"{1e3 * cpu_s:8.1f}" for cpu_s in rank["cpu_s"]) + f"{rank['drift']:+9.2%}")
    print("step, ms      " + "".join(f"{1e3 * step:8.1f}" for step in figures["step_s"]) + f"{figures['drift']:+9.2%}")
    print("\n".join(figures["failures"]) or f"passed; {figures['left']} processes left")


def main() -> None:
    """Run, print, and exit with 1 if it failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="steps of stage 2; the first tenth is the warm-up")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        samples, step_s, left = soak(Path(folder), given.steps)
    figures = judge(samples, step_s, given.steps // 10, left)
    if given.json:
        print(json.dumps(figures, indent=2))
    else:
        show(figures)
    sys.exit(bool(figures["failures"]))


if __name__ == "__main__":
    main()
