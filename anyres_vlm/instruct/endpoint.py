"""Send requests to an OpenAI-compatible endpoint within rate limits, with retries."""

from __future__ import annotations

import asyncio
import email.utils
import os
import random
import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime

import openai

from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.instruct.job import Item, Limits

NO_KEY = "no-key-was-given"  # sent to endpoints without authentication
SECRET = 16  # characters; a shorter key is a placeholder
PATH = "/chat/completions"
FIRST_WAIT_S = 0.5
LONGEST_BACKOFF_S = 30.0
WRONG_FOR_ALL = (401, 404)  # wrong key or model; 403 too, until one request has been answered
RETRIED = (408, 409, 429)  # besides all of 500 and above
NUMBER = re.compile(r"\d+(\.\d+)?")


@dataclass(frozen=True)
class Answer:
    """A response: the HTTP status and the body as received."""

    status: int
    body: str


class NoAnswer(Exception):
    """Raised when a request and all its retries got no answer."""


def make_client(base_url: str | None, key_variable: str, limits: Limits) -> openai.AsyncOpenAI:
    """Return the openai client with the key from an environment variable, which is optional for other endpoints.

    Raises `UsageError` if the key is required and the variable is empty.
    """
    key = os.environ.get(key_variable)
    if not key and base_url is None:
        raise UsageError(
            f"no key: set the environment variable {key_variable}, or give the --base-url of a server without keys"
        )
    try:
        return openai.AsyncOpenAI(api_key=key or NO_KEY, base_url=base_url, timeout=limits.timeout_s, max_retries=0)
    except (openai.OpenAIError, ValueError) as error:
        raise UsageError(f"--base-url {base_url!r}: {error}") from None


class Endpoint:
    """Requests chat completions within rate limits. A 429 delays every request, not only its own.

    The openai client's own retries are off: they ignore a Retry-After above 60 s, do not delay other requests, are not
    counted against the rate limits, and cannot be interrupted by a signal without losing an answer that is paid for.
    """

    def __init__(self, client: openai.AsyncOpenAI, limits: Limits) -> None:
        self.client, self.limits = client, limits
        self._requests = TokenBucket(limits.requests_per_minute)
        self._tokens = TokenBucket(limits.tokens_per_minute)
        self._closed_until = 0.0
        self._answered = False
        self.closing = False
        self.paid: set[asyncio.Task[None] | None] = set()  # tasks whose request was sent and not yet settled

    async def ask(self, item: Item, attempt: int) -> Answer:
        """Send one request and return the answer.

        Raises `NoAnswer` if all retries failed, `UsageError` if the endpoint rejects the key or the model, and
        `DataError` if its Retry-After is longer than the limits allow.
        """
        chance = random.Random(f"{item.key} {attempt}")
        reason = "the run ends"
        for retry in range(self.limits.retries + 1):
            if self.closing:
                break
            await self._admit(item)
            wait_s = backoff_s(retry, chance)
            try:
                return await self._send(item, attempt)
            except openai.APIStatusError as error:
                self._check_access(error)
                if not is_temporary(error.status_code):  # rejected for its content
                    return Answer(error.status_code, without_key(error.response.text, self.client))
                reason = f"HTTP {error.status_code}"
                await self._hold(error, retry, wait_s)
            except openai.APIConnectionError as error:
                is_late = isinstance(error, openai.APITimeoutError)
                reason = f"no answer in {self.limits.timeout_s:g} s" if is_late else f"{error.__cause__ or error}"
                await self._pause(retry, wait_s)
        raise NoAnswer(without_key(reason, self.client))

    def settle(self, item: Item, tokens: int) -> None:
        """Return unused tokens to the rate limit, after the answer was logged."""
        self.paid.discard(asyncio.current_task())
        self._tokens.give_back(item.prompt_tokens + item.job.longest_answer - tokens)

    async def _admit(self, item: Item) -> None:
        await self._requests.take(1)
        await self._tokens.take(item.prompt_tokens + item.job.longest_answer)
        while (wait_s := self._closed_until - time.monotonic()) > 0:
            await asyncio.sleep(wait_s)

    async def _send(self, item: Item, attempt: int) -> Answer:
        # The key is the same for all retries of an attempt, so that an endpoint that supports it answers only once.
        # `chat.completions.create` would validate the body, a third of the client's time, and parse the answer, whose
        # text the log needs.
        name = f"{item.key}-{attempt}"
        task = asyncio.current_task()
        self.paid.add(task)
        try:
            body = await self.client.post(
                PATH, cast_to=str, body=item.body(), options={"headers": {"Idempotency-Key": name}}
            )
        except openai.APIError:
            self.paid.discard(task)
            raise
        self._answered = True
        return Answer(200, answer_without_key(body, self.client))

    def _check_access(self, error: openai.APIStatusError) -> None:
        """Raise `UsageError` if the endpoint rejects the key, the model or the account."""
        status = error.status_code
        if status in WRONG_FOR_ALL or (status == 403 and not self._answered) or error.code == "insufficient_quota":
            raise UsageError(f"the endpoint refuses: {without_key(error.message, self.client)}") from None

    async def _hold(self, error: openai.APIStatusError, retry: int, wait_s: float) -> None:
        asked_s = retry_after(error.response.headers.get("retry-after"))
        if asked_s > self.limits.longest_wait_s:
            raise DataError(f"the endpoint asks to wait {asked_s:,.0f} s: rerun after that to resume") from None
        if error.status_code == 429 or asked_s:
            self._closed_until = max(self._closed_until, time.monotonic() + max(asked_s, wait_s))
        await self._pause(retry, max(asked_s, wait_s))

    async def _pause(self, retry: int, wait_s: float) -> None:
        if retry < self.limits.retries and not self.closing:
            await asyncio.sleep(wait_s)


def is_temporary(status: int) -> bool:
    """Return whether the same request may succeed later, by the HTTP status of its answer."""
    return status >= 500 or status in RETRIED


def without_key(text: str, client: openai.AsyncOpenAI) -> str:
    """Replace the key, which some endpoints repeat in their messages."""
    return text.replace(client.api_key, "[key]")


def answer_without_key(text: str, client: openai.AsyncOpenAI) -> str:
    """Replace the key in an answer, unless it is a placeholder such as `test`, which may be an ordinary word there."""
    return without_key(text, client) if len(client.api_key) >= SECRET else text


def backoff_s(retry: int, chance: random.Random) -> float:
    """Return the seconds to wait before a retry if the endpoint does not specify them."""
    return min(FIRST_WAIT_S * 2.0**retry, LONGEST_BACKOFF_S) * chance.uniform(0.5, 1.5)


def retry_after(header: str | None) -> float:
    """Return the seconds of a Retry-After header, a number or a date; 0 if it is absent or unreadable."""
    if header is None:
        return 0.0
    if NUMBER.fullmatch(header.strip()):
        return float(header)
    try:
        date = email.utils.parsedate_to_datetime(header)
    except ValueError:
        return 0.0
    return max((date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds(), 0.0)


BURST_S = 2.0  # an idle bucket fills up to the amount of two seconds


class TokenBucket:
    """Grants amounts at a rate per minute, in order of request; without a rate, at once.

    `aiolimiter` has no way to return unused tokens and refuses amounts above its capacity, which a long prompt is.
    """

    def __init__(self, per_minute: float | None) -> None:
        self._rate = None if per_minute is None else per_minute / 60
        self._level = 0.0 if self._rate is None else self._rate * BURST_S
        self._filled_at: float | None = None
        self._turn = asyncio.Lock()

    async def take(self, amount: float) -> None:
        """Wait until the amount is available. An amount above the capacity is granted at once and paid off later."""
        if self._rate is None:
            return
        async with self._turn:
            self._fill()
            missing = amount - max(self._level, 0.0) if amount <= self._rate * BURST_S else 0.0
            wait_s = max(missing, -self._level) / self._rate
            if wait_s > 0:
                await asyncio.sleep(wait_s)
                self._fill()
            self._level -= amount

    def give_back(self, amount: float) -> None:
        """Return an unused amount; a negative one takes more, for which later requests wait."""
        if self._rate is not None:
            self._level = min(self._level + amount, self._rate * BURST_S)

    def _fill(self) -> None:
        assert self._rate is not None
        now = asyncio.get_running_loop().time()
        if self._filled_at is not None:
            self._level = min(self._level + (now - self._filled_at) * self._rate, self._rate * BURST_S)
        self._filled_at = now
