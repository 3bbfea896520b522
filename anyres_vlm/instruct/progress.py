"""How far a generation is: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from anyres_vlm.instruct.ledger import Ledger

LINE_EVERY_S = 30.0


@contextmanager
def show_progress() -> Iterator[Callable[[int, int, Ledger], None]]:
    """Shows settled items, time left, tokens and cost of what it is told: settled items, all items, what is known."""
    console = Console(stderr=True)
    columns = (TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *columns, TextColumn("{task.fields[numbers]}"), console=console, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=None, numbers="")
        lines = _Lines()

        def update(done: int, total: int, ledger: Ledger) -> None:
            cost = "" if ledger.job is None or ledger.job.price is None else f"  ${ledger.spent.cost:,.2f}"
            numbers = f"{ledger.spent.tokens:,} tokens{cost}"
            bar.update(task, completed=done, total=total, numbers=numbers)
            if not console.is_terminal:
                lines.update(done, total, numbers)

        yield update


class _Lines:
    """A plain line now and then."""

    def __init__(self) -> None:
        self._began: tuple[float, int] | None = None
        self._said = time.monotonic()

    def update(self, done: int, total: int, numbers: str) -> None:
        now = time.monotonic()
        if self._began is None:
            self._began = (now, done)
        if now - self._said >= LINE_EVERY_S:
            self._said = now
            rate = (done - self._began[1]) / (now - self._began[0])
            left = f"{(total - done) / rate:,.0f} s left" if rate else "no end in sight"
            print(f"generating {done:,}/{total:,}  {left}  {numbers}", file=sys.stderr, flush=True)
