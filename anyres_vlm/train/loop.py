"""The training loop: fetch, forward, backward, step, log, save; a line each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator

from torch.optim.lr_scheduler import LambdaLR

from anyres_vlm.schema import Batch
from anyres_vlm.train.engine.engine import Engine, StepResult
from anyres_vlm.train.throughput import Throughput


def run_steps(
    engine: Engine,
    steps: Iterable[list[Batch]],
    schedule: LambdaLR,
    seed: int,
    first_step: int,
    throughput: Throughput,
    asks: Callable[[], tuple[bool, bool]],
) -> Iterator[tuple[int, StepResult, dict[str, float]]]:
    """Train over the optimizer steps that are left; yields each one's number, result and metrics.

    `asks` says before a step whether this rank wants to stop, and to save, behind it. Dropout is seeded from (`seed`,
    step, rank), so that a resumed run draws what the undisturbed one drew.
    """
    fetching = time.monotonic()
    for step, batches in enumerate(steps, start=first_step + 1):
        started = time.monotonic()
        rate = float(schedule.get_last_lr()[0])
        engine.seed(seed, step)
        stop, save = asks()
        result = engine.step(batches, stop=stop, save=save)
        schedule.step()
        finished = time.monotonic()
        numbers = _numbers(result, rate) | {
            "time/wait_s": round(started - fetching, 4),
            "time/step_s": round(finished - started, 4),
        }
        yield step, result, numbers | throughput.rates(result, finished - fetching)
        fetching = time.monotonic()


def _numbers(result: StepResult, rate: float) -> dict[str, float]:
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
    }
    return {name: number for name, number in numbers.items() if math.isfinite(number)}  # JSON has no other
