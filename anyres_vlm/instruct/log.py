"""The raw log: every response as received, on the disk before it is parsed, and what the log amounts to.

A line is a JSON object: `job` (the first), `count`, `batch_name`, or a response with its item. Concurrent appends share
one fsync. A line cut short by a kill is the last one; the next run removes it.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anyres_vlm.data.blobs import open_file
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.files import LineFile
from anyres_vlm.instruct.annotations import Scene
from anyres_vlm.instruct.checks import decode_body, judge
from anyres_vlm.instruct.grounding import Reject
from anyres_vlm.instruct.job import Item, Job, Kind, estimate_tokens

NAME = "responses.jsonl"


def read_log(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield offset and entry of each complete line. Raises `DataError` for a malformed line before the last one."""
    with open_file(path, str(path)) as stream:
        offset = 0
        for number, line in enumerate(stream, start=1):
            if not line.endswith(b"\n"):
                return
            yield offset, parse_entry(line, f"{path} line {number}")
            offset += len(line)


def parse_entry(line: bytes, name: str) -> dict[str, Any]:
    """Parse one line of the log. Raises `DataError` if it is not an entry."""
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    if not isinstance(entry, dict):
        raise DataError(f"{name}: not an entry of a raw log; another program changed the file")
    return entry


class RawLog:
    """The log, open for appending by this process alone."""

    def __init__(self, path: Path) -> None:
        """Raise `UsageError` if another process writes to the log."""
        try:
            self._file = LineFile(path)
        except BlockingIOError:
            raise UsageError(f"{path}: another process is generating into this folder: wait for it") from None
        self._waiting: list[tuple[bytes, asyncio.Future[int]]] = []
        self._writer: asyncio.Task[None] | None = None

    async def append(self, entry: dict[str, Any]) -> int:
        """Return the entry's offset once it is on the disk. Raises `OSError` if it cannot be written."""
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append((json.dumps(entry).encode() + b"\n", done))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write_waiting())
        return await done

    async def close(self) -> None:
        """Write the remaining entries, close the file and release its lock."""
        if self._writer is not None:
            await self._writer
        self._file.close()

    async def _write_waiting(self) -> None:
        while self._waiting:
            lines, self._waiting = self._waiting, []
            offset = self._file.size
            try:
                await asyncio.to_thread(self._file.write, b"".join(line for line, _ in lines))
            except OSError as error:
                for _, done in lines:
                    if not done.done():
                        done.set_exception(error)
                continue
            for line, done in lines:
                if not done.done():  # its task was cancelled
                    done.set_result(offset)
                offset += len(line)


@dataclass
class Spent:
    """Cost of the responses in an output folder so far, by the endpoint's token counts."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0  # US dollars; 0 without a price

    @property
    def tokens(self) -> int:
        """Return the tokens of prompts and answers together."""
        return self.prompt_tokens + self.completion_tokens

    def add(self, entry: dict[str, Any], item: Item) -> int:
        """Add the cost of a response and return its tokens."""
        if entry["status"] != 200:
            return 0
        prompt, answer = _usage(entry, item)
        self.prompt_tokens += prompt
        self.completion_tokens += answer
        if item.job.price is not None:
            self.cost += item.job.price.cost(prompt, answer, "batch" in entry)
        return prompt + answer


@dataclass(slots=True)
class State:
    """State of one item. `offset` is that of its first accepted response or, without one, of the last response."""

    kind: Kind
    attempts: set[int] = field(default_factory=set)
    offset: int = -1
    good: bool = False
    reject: Reject | None = None

    def settled(self, attempts: int) -> bool:
        """Return whether no further request is made for the item."""
        final = self.reject is not None and self.reject.kind == "refused_request"
        return self.good or final or len(self.attempts) >= attempts


@dataclass
class Ledger:
    """Summary of a raw log, updated entry by entry while the log is read or written."""

    job: Job | None = None
    counts: dict[Kind, int] = field(default_factory=dict)
    states: dict[str, State] = field(default_factory=dict)
    spent: Spent = field(default_factory=Spent)
    responses: int = 0
    repaired: int = 0
    failed_attempts: Counter[str] = field(default_factory=Counter)  # by reject kind, also of items accepted later
    batches: dict[str, dict[str, Any]] = field(default_factory=dict)  # latest entry by name

    @property
    def has_open_batches(self) -> bool:
        """Return whether a batch was, or may have been, submitted and is not collected."""
        return any(entry["state"] != "collected" for entry in self.batches.values())

    def settled(self, key: str, attempts: int) -> bool:
        """Return whether no further request is made for an item."""
        return key in self.states and self.states[key].settled(attempts)

    def made(self, key: str) -> set[int]:
        """Return the numbers of an item's answered attempts."""
        return self.states[key].attempts if key in self.states else set()

    def add(self, entry: dict[str, Any], item: Item | None = None, offset: int = -1) -> int:
        """Add one entry and return the tokens of a response, 0 for other entries.

        Raises `DataError` for a response before the job, or one that is already logged.
        """
        if "job" in entry:
            self.job = Job.model_validate(entry["job"])
        elif "count" in entry:
            self.counts |= {kind: max(count, self.counts.get(kind, 0)) for kind, count in entry["count"].items()}
        elif "batch_name" in entry:
            self.batches[entry["batch_name"]] = entry
        else:
            if self.job is None:
                raise DataError("the raw log begins with no job: its first line is missing")
            return self._add_response(entry, item or item_of(entry, self.job), offset)
        return 0

    def _add_response(self, entry: dict[str, Any], item: Item, offset: int) -> int:
        state = self.states.setdefault(entry["key"], State(item.kind))
        if entry["attempt"] in state.attempts:
            raise DataError(f"the raw log has attempt {entry['attempt']} of {entry['key'][:12]} twice")
        state.attempts.add(entry["attempt"])
        self.responses += 1
        tokens = self.spent.add(entry, item)
        if state.good:
            return tokens
        state.offset = offset
        try:
            parsed = judge(entry, item)
        except Reject as reject:
            state.reject = reject.with_traceback(None)
            self.failed_attempts[reject.kind] += 1
        else:
            state.good, state.reject = True, None
            self.repaired += parsed.repaired
        return tokens


def read_ledger(path: Path) -> Ledger:
    """Read a raw log. Raises `DataError` if it is missing or broken."""
    ledger = Ledger()
    for offset, entry in read_log(path):
        try:
            ledger.add(entry, offset=offset)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path} at byte {offset}: {error if isinstance(error, DataError) else repr(error)}"
            ) from None
    return ledger


def response_entry(item: Item, attempt: int, status: int, body: str, batch: str | None = None) -> dict[str, Any]:
    """Return the log entry of a response."""
    entry = {"key": item.key, "attempt": attempt, "kind": item.kind, "scene": item.scene.to_json()}
    return {**entry, "status": status, "body": body, **({} if batch is None else {"batch": batch})}


def item_of(entry: dict[str, Any], job: Job) -> Item:
    """Return the item that a response belongs to."""
    return Item(job, entry["kind"], Scene.from_json(entry["scene"]))


def _usage(entry: dict[str, Any], item: Item) -> tuple[int, int]:
    """Return the tokens of prompt and answer: the endpoint's count or, without one, an estimate."""
    try:
        usage = decode_body(entry["body"])["usage"]
        prompt, answer = usage["prompt_tokens"], usage["completion_tokens"]
        if isinstance(prompt, int) and isinstance(answer, int) and prompt >= 0 and answer >= 0:
            return prompt, answer
    except (Reject, KeyError, TypeError):
        pass
    return item.prompt_tokens, estimate_tokens(entry["body"])
