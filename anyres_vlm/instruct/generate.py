"""Ask for every item of a job, many at once, until each has a good response or its attempts are used up."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.instruct.budget import Budget
from anyres_vlm.instruct.endpoint import Endpoint, NoAnswer
from anyres_vlm.instruct.job import Item
from anyres_vlm.instruct.ledger import Ledger
from anyres_vlm.instruct.raw_log import RawLog
from anyres_vlm.instruct.verdict import response_entry

BROKEN_LINE = 25  # requests in a row that got no answer, or only a refusal, after which the endpoint counts as down

Progress = Callable[[int, int, Ledger], None]  # settled items, all items, what is known so far


@dataclass
class Stop:
    """Why a run ends before its items do; the first reason counts."""

    reason: str | None = None
    error: Exception | None = None
    asked: bool = False  # by a signal
    then: Callable[[], None] = lambda: None  # called once

    def __call__(self, reason: str, error: Exception | None = None, asked: bool = False) -> None:
        if self.reason is None:
            self.reason, self.error, self.asked = reason, error, asked
            self.then()

    def on_signals(self) -> None:
        """SIGINT and SIGTERM end the run once what is under way has been answered and logged."""
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self, f"{number.name} received", None, True)


@dataclass
class Generation:
    """One run. What it has learnt is in the ledger, and on the disk before that."""

    ledger: Ledger
    log: RawLog
    budget: Budget
    endpoint: Endpoint
    attempts: int
    progress: Progress
    stop: Stop = field(default_factory=Stop)
    _unanswered: int = 0
    _settled: int = 0
    _total: int = 0
    _workers: list[asyncio.Task[None]] = field(default_factory=list)

    async def run(self, items: Sequence[Item]) -> Stop:
        """Settle the items in order. Raises `OSError` where the log cannot be written."""
        open_items = [item for item in items if not self.ledger.settled(item.key, self.attempts)]
        self._total, self._settled = len(items), len(items) - len(open_items)
        self.progress(self._settled, self._total, self.ledger)
        queue = iter(open_items)
        self.stop.then = self._end
        self.stop.on_signals()
        async with asyncio.TaskGroup() as group:
            for _ in range(min(self.endpoint.limits.concurrency, len(open_items))):
                self._workers.append(group.create_task(self._work(queue)))
        return self.stop

    def _end(self) -> None:
        """Let those go that wait for a rate, a retry or the budget; what was sent is waited for, as it is paid."""
        self.endpoint.closing = True
        for worker in {*self._workers} - self.endpoint.paid - {asyncio.current_task()}:
            worker.cancel()

    async def _work(self, queue: Iterator[Item]) -> None:
        for item in queue:
            while self.stop.reason is None and not self.ledger.settled(item.key, self.attempts):
                if not await self.budget.reserve(item):
                    self.stop("the budget is used up")
                    break
                try:
                    answered = self.stop.reason is None and await self._ask(item)
                finally:
                    await self.budget.release(item)
                if not answered:
                    break
            if self.stop.reason is not None:
                return
            self._settled += self.ledger.settled(item.key, self.attempts)
            self.progress(self._settled, self._total, self.ledger)

    async def _ask(self, item: Item) -> bool:
        """Make one attempt; False if it stays without an answer in this run."""
        attempt = len(self.ledger.made(item.key)) + 1
        try:
            answer = await self.endpoint.ask(item, attempt)
        except NoAnswer as failure:
            self._count_unanswered(str(failure))
            return False
        except (UsageError, DataError) as error:
            self.stop(str(error), error)
            return False
        entry = response_entry(item, attempt, answer.status, answer.body)
        offset = await self.log.append(entry)
        self.endpoint.settle(item, self.ledger.add(entry, item, offset))
        if answer.status == 200:
            self._unanswered = 0
        else:
            self._count_unanswered(f"HTTP {answer.status}: {answer.body[:200]}")
        return True

    def _count_unanswered(self, reason: str) -> None:
        self._unanswered += 1
        if self._unanswered >= BROKEN_LINE:
            message = f"{self._unanswered} requests in a row failed, the last with: {reason}"
            self.stop(message, DataError(f"{message}; what was answered is kept, start again when it works"))
