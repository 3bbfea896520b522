"""Run a generation: send a request for every item, log each response, and build the data set."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress as ProgressBar, TextColumn, TimeRemainingColumn

from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.instruct.annotations import Scene
from anyres_vlm.instruct.assemble import build
from anyres_vlm.instruct.batch import BatchGeneration
from anyres_vlm.instruct.budget import FAILURES_LIMIT, Budget, Estimate, Progress, Stop, estimate
from anyres_vlm.instruct.endpoint import Endpoint, NoAnswer, make_client
from anyres_vlm.instruct.job import Item, Job, Kind, Settings, choose, load_prompts
from anyres_vlm.instruct.log import NAME, Ledger, RawLog, read_ledger, response_entry


@dataclass(frozen=True)
class Order:
    """What one run is to do; everything else is in the settings."""

    counts: Mapping[Kind, int]
    out: Path
    boxes: bool = False  # also for prompts without boxes
    mode: Literal["sync", "batch"] = "sync"
    max_cost: float | None = None
    max_tokens: int | None = None


def make_items(scenes: Sequence[Scene], settings: Settings, order: Order) -> list[Item]:
    """Return the items of a run. Raises `UsageError` for invalid prompts and `DataError` for too few images."""
    if settings.model is None:
        raise UsageError("no model: give --model NAME, or model in the config")
    job = Job(
        model=settings.model,
        parameters=settings.parameters,
        prompts=load_prompts(settings.prompts, order.boxes),
        seed=settings.seed,
        checks=settings.checks,
        longest_answer=settings.longest_answer,
        price=settings.prices.get(settings.model),
    )
    return choose(job, scenes, order.counts)


def estimate_run(items: list[Item], order: Order) -> Estimate:
    """Estimate the cost of the remaining items without sending a request."""
    log = order.out / NAME
    if log.exists():
        ledger = read_ledger(log)
        items = [item for item in items if not ledger.settled(item.key, item.job.checks.attempts)]
    return estimate(items, order.mode == "batch")


def generate(items: list[Item], settings: Settings, order: Order, progress: Progress) -> tuple[dict[str, Any], Stop]:
    """Generate all items, then build the data set. Returns the summary and whether the run ended early.

    The output folder's raw log is resumed. Raises `UsageError` if it belongs to another job, or if it has open batches
    whose requests a run without `--mode batch` would pay for again.
    """
    return asyncio.run(_generate(items, settings, order, progress))


async def _generate(
    items: list[Item], settings: Settings, order: Order, progress: Progress
) -> tuple[dict[str, Any], Stop]:
    job = items[0].job
    path = order.out / NAME
    client = make_client(settings.base_url, settings.key_variable, settings.limits)
    log = RawLog(path)
    try:
        ledger = read_ledger(path)
        if order.mode == "sync" and ledger.has_open_batches:
            raise UsageError(f"{order.out} has batches under way, which will be paid: resume with --mode batch")
        budget = Budget(job, ledger.spent, order.max_cost, order.max_tokens)
        await _open_job(job, ledger, log, order)
        limits, attempts = settings.limits, job.checks.attempts
        async with client:
            if order.mode == "batch":
                patient = client.with_options(max_retries=limits.retries)
                folder = order.out / "batches"
                batches = BatchGeneration(ledger, log, budget, patient, limits, attempts, folder, progress)
                stop = await batches.run(items)
            else:
                endpoint = Endpoint(client, limits)
                stop = await Generation(ledger, log, budget, endpoint, attempts, progress).run(items)
    finally:
        await log.close()
    return build(path, order.out, ledger), stop


async def _open_job(job: Job, ledger: Ledger, log: RawLog, order: Order) -> None:
    """Record the job in a new log, or what this run adds to it in an existing one."""
    if ledger.job is not None:
        job.require_same(ledger.job, str(order.out))
    entries: list[dict[str, Any]] = []
    if ledger.job is None or ledger.job != job:
        entries.append({"job": job.model_dump(mode="json")})
    if any(ledger.counts.get(kind, 0) < count for kind, count in order.counts.items()):
        entries.append({"count": dict(order.counts)})
    for entry in entries:
        await log.append(entry)
        ledger.add(entry)


@dataclass
class Generation:
    """One run with one request per response. Every response is on the disk before it enters the ledger."""

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
        """Settle the items in order. Raises `OSError` if the log cannot be written."""
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
        """Cancel workers that wait for a rate, a retry or the budget; requests that were sent are paid and finish."""
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
        """Make one attempt; False if it gets no answer in this run."""
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
        if self._unanswered >= FAILURES_LIMIT:
            message = f"{self._unanswered} requests in a row failed, the last with: {reason}"
            self.stop(message, DataError(f"{message}; answers are kept: rerun to resume once the endpoint works"))


LINE_EVERY_S = 30.0


@contextmanager
def show_progress() -> Iterator[Callable[[int, int, Ledger], None]]:
    """Yield a callback that shows settled items, time left, tokens and cost: a bar on a terminal, lines elsewhere."""
    console = Console(stderr=True)
    columns = (TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with ProgressBar(
        *columns, TextColumn("{task.fields[numbers]}"), console=console, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=None, numbers="")
        first: tuple[float, int] | None = None  # time and settled items; a large log may take minutes to read before
        printed = 0.0

        def update(done: int, total: int, ledger: Ledger) -> None:
            nonlocal first, printed
            cost = "" if ledger.job is None or ledger.job.price is None else f"  ${ledger.spent.cost:,.2f}"
            numbers = f"{ledger.spent.tokens:,} tokens{cost}"
            bar.update(task, completed=done, total=total, numbers=numbers)
            now = time.monotonic()
            if first is None:
                first, printed = (now, done), now
            if not console.is_terminal and now - printed >= LINE_EVERY_S:
                printed = now
                rate = (done - first[1]) / (now - first[0])
                left = f"{(total - done) / rate:,.0f} s left" if rate else "time left unknown"
                print(f"generating {done:,}/{total:,}  {left}  {numbers}", file=sys.stderr, flush=True)

        yield update
