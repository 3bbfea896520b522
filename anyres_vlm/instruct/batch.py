"""Generate through the Batch API: write requests to files, submit, poll and collect them, at half the price.

The raw log records each submission before and after it happens, and a batch carries a name that is a hash of its
content. A run that was killed or disconnected in between therefore finds its batch again and does not pay twice.
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
from anyres_vlm.instruct.budget import FAILURES_LIMIT, Budget, Progress, Stop
from anyres_vlm.instruct.endpoint import answer_without_key, backoff_s, is_temporary, retry_after, without_key
from anyres_vlm.instruct.job import Item, Limits
from anyres_vlm.instruct.log import Ledger, RawLog, response_entry

logger = logging.getLogger(__name__)

MOST_REQUESTS = 50_000  # per file, OpenAI's limit
MOST_BYTES = 190_000_000  # per file; OpenAI's limit is 200 MB
ENDED = ("completed", "failed", "expired", "cancelled")
SIGNAL_POLL_S = 0.5  # longest delay of a signal
SHARE = 1000  # lines of a result per fsync
CUSTOM_ID = re.compile(rb'"custom_id": *"([0-9a-f]{64})-([1-9]\d*)"')


@dataclass
class BatchGeneration:
    """One run: submits rounds of batches until every item is settled."""

    ledger: Ledger
    log: RawLog
    budget: Budget
    client: openai.AsyncOpenAI
    limits: Limits
    attempts: int
    folder: Path  # of the submitted files
    progress: Progress
    stop: Stop = field(default_factory=Stop)

    async def run(self, items: Sequence[Item]) -> Stop:
        """Settle the items. Raises `OSError` if the log cannot be written."""
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
            self.stop(message, DataError(f"{message}; rerun to resume"))
        except (UsageError, DataError) as error:
            self.stop(str(error), error)
        return self.stop

    async def _round(self, items: dict[str, Item]) -> None:
        """Make one more attempt for every open item that fits into the budget."""
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
                f"none of the {len(payable)} requests of a batch was answered: see the endpoint's own report"
            )

    def _files(self, items: Sequence[Item]) -> Iterator[bytes]:
        """Yield the requests as files within the API's limits."""
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
        # The count makes a second submission of the same requests, after a failed one, another batch.
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
        """Create the batch and return its id; None if a signal came first.

        If the answer is lost, look for the batch before creating it again, so that it never runs twice.
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
        """Wait for every submitted batch, those of earlier runs included, and log its responses."""
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
        """Return the id of a batch by its name; None if the submission never arrived."""
        async for batch in self.client.batches.list(limit=100):
            if batch.metadata is not None and batch.metadata.get("anyres") == name:
                return batch.id
        return None

    async def _find_later(self, name: str) -> str | None:
        """Look again after a while, as a new batch may not be listed yet."""
        await self._pause(self.limits.poll_s)
        return None if self.stop.reason is not None else await self._find(name)

    async def _wait(self, number: str) -> Batch | None:
        """Return the batch once it has ended; None if a signal came first. Temporary failures are tolerated."""
        failed = 0
        while self.stop.reason is None:
            try:
                batch = await self.client.batches.retrieve(number)
                failed = 0
                if batch.status in ENDED:
                    return batch
            except (openai.APIConnectionError, openai.APIStatusError) as error:
                failed += 1
                if failed == FAILURES_LIMIT or not _passes(error):
                    raise
            await self._pause(self.limits.poll_s)
        return None

    async def _pause(self, wait_s: float) -> None:
        """Wait, but no longer than until a signal."""
        end = asyncio.get_running_loop().time() + wait_s
        while self.stop.reason is None and (left_s := end - asyncio.get_running_loop().time()) > 0:
            await asyncio.sleep(min(SIGNAL_POLL_S, left_s))

    async def _collect(self, name: str, batch: Batch, items: dict[str, Item]) -> None:
        for file in (batch.output_file_id, batch.error_file_id):
            if file is None:
                continue
            content = await self.client.files.content(file)
            lines = content.content.splitlines()  # of bytes; in `str` it also splits at characters that JSON may hold
            for start in range(0, len(lines), SHARE):
                entries: dict[tuple[str, int], dict[str, Any]] = {}
                for line in lines[start : start + SHARE]:
                    if line.strip() and (entry := self._entry(name, line, items)) is not None:
                        entries.setdefault((entry["key"], entry["attempt"]), entry)
                offsets = await asyncio.gather(*map(self.log.append, entries.values()))
                for entry, offset in zip(entries.values(), offsets, strict=True):
                    self.ledger.add(entry, items[entry["key"]], offset)

    def _entry(self, name: str, line: bytes, items: dict[str, Item]) -> dict[str, Any] | None:
        """Return the log entry for a line of a result; None if it has no response or one that is already logged.

        A line that cannot be parsed was paid for and is logged unchanged.
        """
        try:
            result = json.loads(line)
            key, _, attempt = result["custom_id"].rpartition("-")
            number, response = int(attempt), result.get("response") or {}
            status, body = response.get("status_code"), json.dumps(response.get("body"))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            if (found := CUSTOM_ID.search(line)) is None:
                logger.warning("batch %s: skipped a line of its result that is not the API's: %r", name, line[:100])
                return None
            key, number, status, body = found[1].decode(), int(found[2]), 200, line.decode(errors="replace")
        if key not in items:
            raise UsageError(
                f"batch {name} has items that this run lacks: give the counts of the run that submitted it"
            )
        if status is None or is_temporary(status) or number in self.ledger.made(key):
            return None
        return response_entry(items[key], number, status, answer_without_key(body, self.client), batch=name)

    async def _note(self, name: str, state: str, number: str | None = None) -> None:
        entry = {"batch_name": name, "state": state, "id": number}
        self.ledger.add(entry, offset=await self.log.append(entry))


def _passes(error: openai.APIError) -> bool:
    """Return whether the same request may succeed later."""
    if not isinstance(error, openai.APIStatusError):
        return True
    return error.code != "insufficient_quota" and is_temporary(error.status_code)
