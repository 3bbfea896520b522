"""The Batch API: requests written to files, submitted, polled and collected, at half the price and within a day.

The raw log says before and after each submission what was sent, and a batch carries its name, a hash of its content, so
that a run that was killed or cut off in between finds its batch again and pays for it once.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import openai
from openai.types import Batch

from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.instruct.budget import Budget
from anyres_vlm.instruct.endpoint import AGAIN, answer_without_key, backoff_s, retry_after, without_key
from anyres_vlm.instruct.generate import BROKEN_LINE, Progress, Stop
from anyres_vlm.instruct.job import Item
from anyres_vlm.instruct.ledger import Ledger
from anyres_vlm.instruct.raw_log import RawLog
from anyres_vlm.instruct.settings import Limits
from anyres_vlm.instruct.verdict import response_entry

logger = logging.getLogger(__name__)

MOST_REQUESTS = 50_000  # of one file, as OpenAI limits it
MOST_BYTES = 190_000_000  # of its 200 MB
ENDED = ("completed", "failed", "expired", "cancelled")
LOOK_S = 0.5  # between looks for a signal
SHARE = 1000  # lines of a result that one fsync brings to the disk
CUSTOM_ID = re.compile(rb'"custom_id": *"([0-9a-f]{64})-([1-9]\d*)"')


@dataclass
class BatchGeneration:
    """One run: rounds of batches until every item is settled."""

    ledger: Ledger
    log: RawLog
    budget: Budget
    client: openai.AsyncOpenAI
    limits: Limits
    attempts: int
    folder: Path  # of the files that are submitted
    progress: Progress
    stop: Stop = field(default_factory=Stop)

    async def run(self, items: Sequence[Item]) -> Stop:
        """Settle the items. Raises `OSError` where the log cannot be written."""
        self.stop.on_signals()
        by_key = {item.key: item for item in items}
        try:
            await self._collect_all(by_key)
            for _ in range(self.limits.retries + self.attempts):
                await self._round(by_key)
                if self.stop.reason is not None:
                    return self.stop
        except openai.APIError as error:
            message = f"the endpoint's Batch API: {without_key(error.message, self.client)}"
            self.stop(message, DataError(f"{message}; start again to go on"))
        except (UsageError, DataError) as error:
            self.stop(str(error), error)
        return self.stop

    async def _round(self, items: dict[str, Item]) -> None:
        """One more attempt for every item that is not settled and can be paid."""
        waiting = [item for item in items.values() if not self.ledger.settled(item.key, self.attempts)]
        self.progress(len(items) - len(waiting), len(items), self.ledger)
        payable = []
        for item in waiting:
            if not self.budget.reserve_now(item, batched=True):
                break
            payable.append(item)
        if waiting and not payable:
            self.stop("the budget is used up")
        for content in self._files(payable):
            if self.stop.reason is None:
                await self._submit(content)
        before = self.ledger.responses
        await self._collect_all(items)
        for item in payable:
            await self.budget.release(item)
        if payable and self.stop.reason is None and self.ledger.responses == before:
            raise DataError(
                f"none of {len(payable)} requests of a batch was answered: look at the endpoint's own report"
            )

    def _files(self, items: Sequence[Item]) -> Iterator[bytes]:
        """The requests as files that the API takes."""
        lines: list[bytes] = []
        size = 0
        for item in items:
            request = {"custom_id": f"{item.key}-{len(self.ledger.made(item.key)) + 1}", "method": "POST"}
            line = json.dumps({**request, "url": "/v1/chat/completions", "body": item.body()}).encode() + b"\n"
            if lines and (len(lines) == MOST_REQUESTS or size + len(line) > MOST_BYTES):
                yield b"".join(lines)
                lines, size = [], 0
            lines.append(line)
            size += len(line)
        if lines:
            yield b"".join(lines)

    async def _submit(self, content: bytes) -> None:
        # A file of the same requests as one that failed is another batch.
        name = sha256(content + str(len(self.ledger.batches)).encode()).hexdigest()[:24]
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"{name}.jsonl"
        path.write_bytes(content)
        file = await self.client.files.create(file=path, purpose="batch")
        await self._note(name, "submitting")
        number = await self._create(name, file.id)
        if number is not None:
            await self._note(name, "submitted", number)

    async def _create(self, name: str, file: str) -> str | None:
        """The batch's id; None where a signal came first.

        Where the answer is lost, the batch is looked for before it is made again: made twice, it would run twice.
        """
        once, chance = self.client.with_options(max_retries=0), random.Random(name)
        for retry in range(self.limits.retries + 1):
            try:
                batch = await once.batches.create(
                    input_file_id=file,
                    endpoint="/v1/chat/completions",
                    completion_window="24h",
                    metadata={"anyres": name},
                    extra_headers={"Idempotency-Key": name},
                )
            except (openai.APIConnectionError, openai.APIStatusError) as error:
                asked = error.response.headers.get("retry-after") if isinstance(error, openai.APIStatusError) else None
                asked_s = retry_after(asked)
                if retry == self.limits.retries or asked_s > self.limits.longest_wait_s or not _passes(error):
                    raise
                await self._pause(max(asked_s, backoff_s(retry, chance)))
            else:
                return batch.id
            if self.stop.reason is not None:
                return None
            if (number := await self._find(name)) is not None:
                return number
        return None

    async def _collect_all(self, items: dict[str, Item]) -> None:
        """Wait for every batch that was submitted, also by a run before this one, and log what it brought."""
        for name, entry in list(self.ledger.batches.items()):
            if entry["state"] == "collected":
                continue
            number = entry["id"] or await self._find(name) or await self._find_later(name)
            batch = None if number is None else await self._wait(number)
            if self.stop.reason is not None:
                return
            if batch is not None:
                await self._collect(name, batch, items)
            await self._note(name, "collected", number)
            if batch is not None and batch.status == "failed":
                faults = [] if batch.errors is None else batch.errors.data or []
                raise DataError(f"batch {batch.id} failed: {'; '.join(str(fault.message) for fault in faults[:3])}")
            self.progress(sum(self.ledger.settled(key, self.attempts) for key in items), len(items), self.ledger)

    async def _find(self, name: str) -> str | None:
        """The batch of a submission that was cut off; None where it never arrived."""
        async for batch in self.client.batches.list(limit=100):
            if batch.metadata is not None and batch.metadata.get("anyres") == name:
                return batch.id
        return None

    async def _find_later(self, name: str) -> str | None:
        """The same a while later, as what was submitted a moment ago may not be listed yet."""
        await self._pause(self.limits.poll_s)
        return None if self.stop.reason is not None else await self._find(name)

    async def _wait(self, number: str) -> Batch | None:
        """The batch when it has ended; None where a signal came first. An endpoint may be down for a while."""
        failed = 0
        while self.stop.reason is None:
            try:
                batch = await self.client.batches.retrieve(number)
                failed = 0
                if batch.status in ENDED:
                    return batch
            except (openai.APIConnectionError, openai.APIStatusError) as error:
                failed += 1
                if failed == BROKEN_LINE or not _passes(error):
                    raise
            await self._pause(self.limits.poll_s)
        return None

    async def _pause(self, wait_s: float) -> None:
        """Wait, or until a signal comes."""
        end = asyncio.get_running_loop().time() + wait_s
        while self.stop.reason is None and (left_s := end - asyncio.get_running_loop().time()) > 0:
            await asyncio.sleep(min(LOOK_S, left_s))

    async def _collect(self, name: str, batch: Batch, items: dict[str, Item]) -> None:
        for file in (batch.output_file_id, batch.error_file_id):
            if file is None:
                continue
            content = await self.client.files.content(file)
            lines = content.content.splitlines()  # of bytes: only the ends of lines, no character that JSON may hold
            for start in range(0, len(lines), SHARE):
                entries: dict[tuple[str, int], dict[str, Any]] = {}
                for line in lines[start : start + SHARE]:
                    if line.strip() and (entry := self._entry(name, line, items)) is not None:
                        entries.setdefault((entry["key"], entry["attempt"]), entry)
                offsets = await asyncio.gather(*map(self.log.append, entries.values()))
                for entry, offset in zip(entries.values(), offsets, strict=True):
                    self.ledger.add(entry, items[entry["key"]], offset)

    def _entry(self, name: str, line: bytes, items: dict[str, Item]) -> dict[str, Any] | None:
        """A line of a result as a response; None where it brings none, or one that is logged already.

        A line that cannot be read, and was paid for, is kept as it is.
        """
        try:
            result = json.loads(line)
            key, _, attempt = result["custom_id"].rpartition("-")
            number, response = int(attempt), result.get("response") or {}
            status, body = response.get("status_code"), json.dumps(response.get("body"))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            if (found := CUSTOM_ID.search(line)) is None:
                logger.warning("batch %s: a line of its result is none of the API's: %r", name, line[:100])
                return None
            key, number, status, body = found[1].decode(), int(found[2]), 200, line.decode(errors="replace")
        if key not in items:
            raise UsageError(f"batch {name} has items that this run has not: give the counts of the run that made it")
        if status is None or status >= 500 or status in AGAIN or number in self.ledger.made(key):
            return None
        return response_entry(items[key], number, status, answer_without_key(body, self.client), batch=name)

    async def _note(self, name: str, state: str, number: str | None = None) -> None:
        entry = {"batch_name": name, "state": state, "id": number}
        self.ledger.add(entry, offset=await self.log.append(entry))


def _passes(error: openai.APIError) -> bool:
    """Whether the same request may go through later."""
    if not isinstance(error, openai.APIStatusError):
        return True
    return error.code != "insufficient_quota" and (error.status_code >= 500 or error.status_code in AGAIN)
