"""One request to an OpenAI-compatible endpoint, made again until it is answered."""

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
from anyres_vlm.instruct.job import Item
from anyres_vlm.instruct.rate import TokenBucket
from anyres_vlm.instruct.settings import Limits

NO_KEY = "no-key-was-given"  # what endpoints without keys are told
SECRET = 16  # characters that a key has at least, where it is no placeholder
PATH = "/chat/completions"
FIRST_WAIT_S = 0.5
LONGEST_BACKOFF_S = 30.0
WRONG_FOR_ALL = (401, 404)  # the key or the model; 403 too, until a request has been answered
AGAIN = (408, 409, 429)
NUMBER = re.compile(r"\d+(\.\d+)?")


@dataclass(frozen=True)
class Answer:
    """What an endpoint sent: the HTTP status and the body as it came."""

    status: int
    body: str


class NoAnswer(Exception):
    """A request stayed without an answer through all its retries."""


def make_client(base_url: str | None, key_variable: str, limits: Limits) -> openai.AsyncOpenAI:
    """The official client. Its key is the environment variable's; an endpoint of one's own may do without.

    Raises `UsageError` where the variable is needed and empty.
    """
    key = os.environ.get(key_variable)
    if not key and base_url is None:
        raise UsageError(
            f"no key: set the environment variable {key_variable}, or give --base-url of a server without one"
        )
    try:
        return openai.AsyncOpenAI(api_key=key or NO_KEY, base_url=base_url, timeout=limits.timeout_s, max_retries=0)
    except (openai.OpenAIError, ValueError) as error:
        raise UsageError(f"--base-url {base_url!r}: {error}") from None


class Endpoint:
    """Asks for chat completions within rate limits. A 429 holds back every request, not only its own."""

    def __init__(self, client: openai.AsyncOpenAI, limits: Limits) -> None:
        self.client, self.limits = client, limits
        self._requests = TokenBucket(limits.requests_per_minute)
        self._tokens = TokenBucket(limits.tokens_per_minute)
        self._closed_until = 0.0
        self._answered = False
        self.closing = False
        self.paid: set[asyncio.Task[None] | None] = (
            set()
        )  # tasks whose request was sent and whose answer is not settled

    async def ask(self, item: Item, attempt: int) -> Answer:
        """The answer to one request.

        Raises `NoAnswer` when all retries failed, `UsageError` where the endpoint takes no request of this key and
        model, and `DataError` where it wants to be left alone for longer than the limits allow.
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
                if error.status_code < 500 and error.status_code not in AGAIN:
                    return self._refusal(error)
                reason = f"HTTP {error.status_code}"
                await self._hold(error, retry, wait_s)
            except openai.APITimeoutError:
                reason = f"no answer in {self.limits.timeout_s:g} s"
                await self._pause(retry, wait_s)
            except openai.APIConnectionError as error:
                reason = f"{error.__cause__ or error}"
                await self._pause(retry, wait_s)
        raise NoAnswer(without_key(reason, self.client))

    def settle(self, item: Item, tokens: int) -> None:
        """The answer is safe: the rate of tokens gets back what it did not use."""
        self.paid.discard(asyncio.current_task())
        self._tokens.give_back(item.prompt_tokens + item.job.longest_answer - tokens)

    async def _admit(self, item: Item) -> None:
        await self._requests.take(1)
        await self._tokens.take(item.prompt_tokens + item.job.longest_answer)
        while (wait_s := self._closed_until - time.monotonic()) > 0:
            await asyncio.sleep(wait_s)

    async def _send(self, item: Item, attempt: int) -> Answer:
        # The same name whenever the same attempt is made, so that an endpoint that knows it answers once.
        # `chat.completions.create` would check the body against its types, a third of the client's time, and parse the
        # answer, of which the log keeps the text.
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

    def _refusal(self, error: openai.APIStatusError) -> Answer:
        """The answer to a request that will never be taken, as for its content."""
        status = error.status_code
        if status in WRONG_FOR_ALL or (status == 403 and not self._answered) or error.code == "insufficient_quota":
            raise UsageError(f"the endpoint refuses: {without_key(error.message, self.client)}") from None
        return Answer(status, without_key(error.response.text, self.client))

    async def _hold(self, error: openai.APIStatusError, retry: int, wait_s: float) -> None:
        if error.code == "insufficient_quota":
            raise UsageError(f"the endpoint refuses: {without_key(error.message, self.client)}") from None
        asked_s = retry_after(error.response.headers.get("retry-after"))
        if asked_s > self.limits.longest_wait_s:
            raise DataError(f"the endpoint asks to wait {asked_s:,.0f} s: start again after that") from None
        if error.status_code == 429 or asked_s:
            self._closed_until = max(self._closed_until, time.monotonic() + max(asked_s, wait_s))
        await self._pause(retry, max(asked_s, wait_s))

    async def _pause(self, retry: int, wait_s: float) -> None:
        if retry < self.limits.retries and not self.closing:
            await asyncio.sleep(wait_s)


def without_key(text: str, client: openai.AsyncOpenAI) -> str:
    """Some endpoints say the key back."""
    return text.replace(client.api_key, "[key]")


def answer_without_key(text: str, client: openai.AsyncOpenAI) -> str:
    """The same of an answer, where a key like `test`, which endpoints of one's own are given, is a word like others."""
    return without_key(text, client) if len(client.api_key) >= SECRET else text


def backoff_s(retry: int, chance: random.Random) -> float:
    """How long to wait before a request is made again, without a word from the endpoint."""
    return min(FIRST_WAIT_S * 2.0**retry, LONGEST_BACKOFF_S) * chance.uniform(0.5, 1.5)


def retry_after(header: str | None) -> float:
    """Seconds that a Retry-After header asks for, as a number or as a date; 0 for none that can be read."""
    if header is None:
        return 0.0
    if NUMBER.fullmatch(header.strip()):
        return float(header)
    try:
        date = email.utils.parsedate_to_datetime(header)
    except ValueError:
        return 0.0
    return max((date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds(), 0.0)
