"""One generation run from its input to its data set."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from anyres_vlm.errors import UsageError
from anyres_vlm.instruct.batch import BatchGeneration
from anyres_vlm.instruct.budget import Budget, Estimate, estimate
from anyres_vlm.instruct.build import build
from anyres_vlm.instruct.endpoint import Endpoint, make_client
from anyres_vlm.instruct.generate import Generation, Progress, Stop
from anyres_vlm.instruct.job import Item, Job, choose
from anyres_vlm.instruct.ledger import Ledger, read_ledger
from anyres_vlm.instruct.prompts import Kind, load_prompts
from anyres_vlm.instruct.raw_log import NAME, RawLog
from anyres_vlm.instruct.scene import Scene
from anyres_vlm.instruct.settings import Settings


@dataclass(frozen=True)
class Order:
    """What one run is to do, beside its settings."""

    counts: Mapping[Kind, int]
    out: Path
    boxes: bool = False  # also where the prompts do without
    mode: Literal["sync", "batch"] = "sync"
    max_cost: float | None = None
    max_tokens: int | None = None


def make_items(scenes: Sequence[Scene], settings: Settings, order: Order) -> list[Item]:
    """The items of a run. Raises `UsageError` for wrong prompts, `DataError` for too few images."""
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
    """What is still to be asked, priced without a request."""
    log = order.out / NAME
    if log.exists():
        ledger = read_ledger(log)
        items = [item for item in items if not ledger.settled(item.key, item.job.checks.attempts)]
    return estimate(items, order.mode == "batch")


def generate(items: list[Item], settings: Settings, order: Order, progress: Progress) -> tuple[dict[str, Any], Stop]:
    """Ask for all items, then build the data set. Returns the summary and whether the run ended early.

    A run goes on from the output folder's raw log. Raises `UsageError` where that holds another job, or batches that a
    run without them would pay for again.
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
        if order.mode == "sync" and ledger.under_way:
            raise UsageError(f"{order.out} has batches under way, which will be paid: go on with --mode batch")
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
    """Record the job in a new log, and in an old one what this run adds to it."""
    if ledger.job is not None:
        job.require_same(ledger.job, str(order.out))
    entries: list[dict[str, Any]] = []
    if ledger.job is None or ledger.job != job:
        entries.append({"job": job.to_json()})
    if any(ledger.counts.get(kind, 0) < count for kind, count in order.counts.items()):
        entries.append({"count": dict(order.counts)})
    for entry in entries:
        await log.append(entry)
        ledger.add(entry)
