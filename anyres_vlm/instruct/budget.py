"""What ends a run before its items do: its budget, a signal, or an endpoint that does not work."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from dataclasses import dataclass, field

from anyres_vlm.errors import UsageError
from anyres_vlm.instruct.job import Item, Job, estimate_tokens
from anyres_vlm.instruct.log import Ledger, Spent

FAILURES_LIMIT = 25  # requests in a row without an answer, or with an HTTP error, until the run ends


Progress = Callable[[int, int, Ledger], None]  # settled items, all items, the ledger so far


@dataclass
class Stop:
    """The reason why a run ends early; the first one counts."""

    reason: str | None = None
    error: Exception | None = None
    asked: bool = False  # the reason is a signal
    then: Callable[[], None] = lambda: None  # called once, with the first reason

    def __call__(self, reason: str, error: Exception | None = None, asked: bool = False) -> None:
        if self.reason is None:
            self.reason, self.error, self.asked = reason, error, asked
            self.then()

    def on_signals(self) -> None:
        """End the run on SIGINT and SIGTERM, after the requests in flight have been answered and logged."""
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self, f"{number.name} received", None, True)


@dataclass
class Budget:
    """Limits for an output folder, earlier runs included. None is no limit.

    A request is sent only if its most expensive answer still fits.
    """

    job: Job
    spent: Spent
    max_cost: float | None = None
    max_tokens: int | None = None
    _reserved: dict[str, tuple[float, int]] = field(default_factory=dict)
    _reserved_cost: float = 0.0
    _reserved_tokens: int = 0
    _freed: asyncio.Condition = field(default_factory=asyncio.Condition)

    def __post_init__(self) -> None:
        if self.max_cost is not None and self.job.price is None:
            raise UsageError(
                f"--max-cost needs the price of {self.job.model}: add it to prices in the config, or use --max-tokens"
            )

    async def reserve(self, item: Item) -> bool:
        """Reserve the highest cost of an item, waiting for other requests to finish; False if it can never fit."""
        async with self._freed:
            while not self.reserve_now(item, batched=False):
                if not self._reserved:
                    return False
                await self._freed.wait()
            return True

    def reserve_now(self, item: Item, batched: bool) -> bool:
        """Reserve without waiting; False if it does not fit now."""
        cost, tokens = highest_cost(item, batched)
        total_cost = cost + self.spent.cost + self._reserved_cost
        total_tokens = tokens + self.spent.tokens + self._reserved_tokens
        if self.max_cost is not None and total_cost > self.max_cost:
            return False
        if self.max_tokens is not None and total_tokens > self.max_tokens:
            return False
        self._reserved[item.key] = (cost, tokens)
        self._reserved_cost += cost
        self._reserved_tokens += tokens
        return True

    async def release(self, item: Item) -> None:
        """Release an item's reservation, after its answer was counted as spent or failed to arrive."""
        async with self._freed:
            cost, tokens = self._reserved.pop(item.key)
            self._reserved_cost = self._reserved_cost - cost if self._reserved else 0.0
            self._reserved_tokens -= tokens
            self._freed.notify_all()


def highest_cost(item: Item, batched: bool) -> tuple[float, int]:
    """Return the highest cost of one response to an item, in US dollars and in tokens."""
    prompt, answer, price = item.most_prompt_tokens, item.job.longest_answer, item.job.price
    return (0.0 if price is None else price.cost(prompt, answer, batched)), prompt + answer


@dataclass(frozen=True)
class Estimate:
    """Expected cost of a job whose items all succeed at the first attempt."""

    requests: int
    prompt_tokens: int
    completion_tokens: int  # for answers as long as the prompts' examples
    cost: float | None
    most: float | None  # for answers of the highest length, and all attempts


def estimate(items: list[Item], batched: bool) -> Estimate:
    """Estimate the cost of a job without sending a request."""
    prompt = answer = 0
    most = 0.0
    examples = {}
    for item in items:
        if item.kind not in examples:
            texts = [example.response for example in item.prompt.examples]
            examples[item.kind] = sum(map(estimate_tokens, texts)) // len(texts) if texts else item.job.longest_answer
        prompt += item.prompt_tokens
        answer += examples[item.kind]
        most += highest_cost(item, batched)[0] * item.job.checks.attempts
    price = items[0].job.price if items else None
    cost = None if price is None else price.cost(prompt, answer, batched)
    return Estimate(len(items), prompt, answer, cost, None if price is None else most)
