"""What may be spent: a request is made only if its dearest answer still fits."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from anyres_vlm.errors import UsageError
from anyres_vlm.instruct.job import Item, Job, estimate_tokens


@dataclass
class Spent:
    """What an output folder's responses cost so far, by the endpoint's own count of tokens."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0  # US dollars; 0 without a price

    @property
    def tokens(self) -> int:
        """Of prompts and answers."""
        return self.prompt_tokens + self.completion_tokens


@dataclass
class Budget:
    """Limits on the whole of an output folder, runs before this one included. None is no limit."""

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
        """Set aside an item's dearest answer, waiting for others to turn out cheaper; False where it will never fit."""
        async with self._freed:
            while not self.reserve_now(item, batched=False):
                if not self._reserved:
                    return False
                await self._freed.wait()
            return True

    def reserve_now(self, item: Item, batched: bool) -> bool:
        """The same without waiting."""
        cost, tokens = dearest(item, batched)
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
        """The item's answer is among what was spent, or there was none."""
        async with self._freed:
            cost, tokens = self._reserved.pop(item.key)
            self._reserved_cost = self._reserved_cost - cost if self._reserved else 0.0
            self._reserved_tokens -= tokens
            self._freed.notify_all()


def dearest(item: Item, batched: bool) -> tuple[float, int]:
    """The most that one response to an item can cost, in US dollars and in tokens."""
    prompt, answer, price = item.most_prompt_tokens, item.job.longest_answer, item.job.price
    return (0.0 if price is None else price.cost(prompt, answer, batched)), prompt + answer


@dataclass(frozen=True)
class Estimate:
    """What a job will cost, if one response an item is good."""

    requests: int
    prompt_tokens: int
    completion_tokens: int  # as long as the prompts' examples
    cost: float | None
    most: float | None  # every answer as long as it may be, every attempt used


def estimate(items: list[Item], batched: bool) -> Estimate:
    """Price a job without a request."""
    prompt = answer = 0
    most = 0.0
    examples = {}
    for item in items:
        if item.kind not in examples:
            texts = [example.response for example in item.job.prompts[item.kind].examples]
            examples[item.kind] = sum(map(estimate_tokens, texts)) // len(texts) if texts else item.job.longest_answer
        prompt += item.prompt_tokens
        answer += examples[item.kind]
        most += dearest(item, batched)[0] * item.job.checks.attempts
    price = items[0].job.price if items else None
    cost = None if price is None else price.cost(prompt, answer, batched)
    return Estimate(len(items), prompt, answer, cost, None if price is None else most)
