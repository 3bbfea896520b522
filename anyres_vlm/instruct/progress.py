"""How far a generation is: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from anyres_vlm.instruct.ledger import Ledger

LINE_EVERY_S = 30.0


class ItemProgress:
    """Settled items, time left, good ones and cost."""

    def __init__(self) -> None:
        columns = (TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, TextColumn("{task.fields[numbers]}"), console=Console(stderr=True))
        self._task = self._bar.add_task("", total=None, numbers="")
        self._began: tuple[float, int] | None = None
        self._said = time.monotonic()

    def update(self, done: int, total: int, ledger: Ledger) -> None:
        """Show so many settled items."""
        cost = "" if ledger.job is None or ledger.job.price is None else f"  ${ledger.spent.cost:,.2f}"
        numbers = f"{ledger.spent.tokens:,} tokens{cost}"
        now = time.monotonic()
        if self._began is None:
            self._began = (now, done)
        if self._bar.console.is_terminal:
            self._bar.update(self._task, completed=done, total=total, numbers=numbers)
        elif now - self._said >= LINE_EVERY_S:
            self._said = now
            rate = (done - self._began[1]) / (now - self._began[0])
            left = f"{(total - done) / rate:,.0f} s left" if rate else "no end in sight"
            print(f"generating {done:,}/{total:,}  {left}  {numbers}", file=sys.stderr, flush=True)

    def __enter__(self) -> ItemProgress:
        if self._bar.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar.live.is_started:
            self._bar.stop()
