"""Progress bars on a terminal; elsewhere, training prints plain lines."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

LINES = 20  # plain lines per stage if the output is not a terminal


class StepProgress:
    """Show each stage's finished steps, loss, throughput and share of time spent waiting for data."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, TextColumn("{task.fields[numbers]}"), console=Console(stderr=True))
        self._stages: dict[str, TaskID] = {}

    def update(self, stage: str, step: int, total: int, numbers: dict[str, float]) -> None:
        """Show one finished optimizer step."""
        loss = f"{numbers['train/loss']:.3f}" if "train/loss" in numbers else "not finite"
        wait, work = numbers["time/wait_s"], numbers["time/step_s"]
        text = f"loss {loss}  {numbers['time/tokens_per_s']:,.0f} tokens/s  {numbers['time/tiles_per_s']:,.1f} tiles/s"
        text += f"  wait {wait / max(wait + work, 1e-9):.0%}"
        if "time/mfu" in numbers:
            text += f"  MFU {numbers['time/mfu']:.1%}"
        if not self._bar.console.is_terminal:
            if step == total or step % max(total // LINES, 1) == 0:
                print(f"{stage} step {step}/{total}  {text}", file=sys.stderr, flush=True)
            return
        if stage not in self._stages:
            self._stages[stage] = self._bar.add_task(stage, total=total, numbers="")
        self._bar.update(self._stages[stage], completed=step, numbers=text)

    def __enter__(self) -> StepProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


class RowProgress:
    """Show finished rows on a terminal and nothing elsewhere; the bar starts with the first rows."""

    def __init__(self, description: str) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task(description, total=None)

    def update(self, done: int, total: int) -> None:
        """Show the number of finished rows."""
        if self._bar.console.is_terminal:
            self._bar.start()  # after the workers' fork: the bar has a thread
            self._bar.update(self._task, completed=done, total=total)

    def __enter__(self) -> RowProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar.live.is_started:
            self._bar.stop()
