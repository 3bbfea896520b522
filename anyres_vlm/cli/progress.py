"""Progress bars on a terminal; elsewhere, training prints plain lines."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LINES = 20  # plain lines per stage if the output is not a terminal


@contextmanager
def show_steps() -> Iterator[Callable[[str, int, int, dict[str, float]], None]]:
    """Show each stage's finished steps, loss, throughput and share of time spent waiting for data.

    Yields the function to call after each optimizer step.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    stages: dict[str, TaskID] = {}

    def update(stage: str, step: int, total: int, numbers: dict[str, float]) -> None:
        loss = f"{numbers['train/loss']:.3f}" if "train/loss" in numbers else "not finite"
        wait, work = numbers["time/wait_s"], numbers["time/step_s"]
        text = f"loss {loss}  {numbers['time/tokens_per_s']:,.0f} tokens/s  {numbers['time/tiles_per_s']:,.1f} tiles/s"
        text += f"  wait {wait / max(wait + work, 1e-9):.0%}"
        if "time/mfu" in numbers:
            text += f"  MFU {numbers['time/mfu']:.1%}"
        if not bar.console.is_terminal:
            if step == total or step % max(total // LINES, 1) == 0:
                print(f"{stage} step {step}/{total}  {text}", file=sys.stderr, flush=True)
            return
        if stage not in stages:
            stages[stage] = bar.add_task(stage, total=total, numbers="")
        bar.update(stages[stage], completed=step, numbers=text)

    with Progress(*columns, TextColumn("{task.fields[numbers]}"), console=Console(stderr=True)) as bar:
        yield update


@contextmanager
def show_rows(description: str) -> Iterator[Callable[[int, int], None]]:
    """Show finished rows on a terminal and nothing elsewhere. Yields the function to call with done and total rows."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(description, total=None)

    def update(done: int, total: int) -> None:
        if bar.console.is_terminal:
            bar.start()  # only now, after workers were forked: the bar has a thread
            bar.update(task, completed=done, total=total)

    try:
        yield update
    finally:
        if bar.live.is_started:
            bar.stop()
