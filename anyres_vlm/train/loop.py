"""The training loop: fetch, forward, backward, step, log, save; a line each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from torch.optim.lr_scheduler import LambdaLR

from anyres_vlm.schema import Batch
from anyres_vlm.train.engine import Engine, StepResult


def run_steps(
    engine: Engine,
    steps: Iterable[list[Batch]],
    schedule: LambdaLR,
    max_grad_norm: float,
    first_step: int,
    after_step: Callable[[int, dict[str, float]], None],
    seed: int,
) -> None:
    """Train over the optimizer steps that are left; `after_step` gets the finished steps and their numbers.

    Dropout is seeded from (`seed`, step, rank), so that a resumed run draws what the undisturbed one drew.
    """
    finished = first_step
    fetching = time.monotonic()
    for batches in steps:
        started = time.monotonic()
        rate = float(schedule.get_last_lr()[0])
        engine.seed(seed, finished)
        result = engine.step(batches, max_grad_norm)
        schedule.step()
        finished += 1
        after_step(finished, _numbers(result, rate, wait_s=started - fetching, step_s=time.monotonic() - started))
        fetching = time.monotonic()


def _numbers(result: StepResult, rate: float, wait_s: float, step_s: float) -> dict[str, float]:
    return {
        "train/loss": result.loss,
        "train/grad_norm": result.grad_norm,
        "train/learning_rate": rate,
        "data/tokens": result.tokens,
        "data/supervised_tokens": result.supervised_tokens,
        "data/samples": result.samples,
        "data/rejects": result.rejects,
        "time/wait_s": round(wait_s, 4),
        "time/step_s": round(step_s, 4),
        "time/tokens_per_s": round(result.tokens / max(wait_s + step_s, 1e-9), 1),
    }
