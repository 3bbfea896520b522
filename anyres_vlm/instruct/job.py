"""What is asked of which model: a job, its items and their requests."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.instruct.prompts import Kind, Prompt
from anyres_vlm.instruct.scene import Scene
from anyres_vlm.instruct.settings import Checks, Price

MESSAGE = 4  # tokens that a chat adds to each message
# What byte-pair tokenizers rarely cut further: of the shipped prompts with 0 to 40 boxes this counts 95% to 99% of what
# those of GPT-4 and GPT-4o do. Other scripts than Latin count a token a character: GPT-4o's has about as many or fewer,
# but for emoji half as many again.
PIECES = re.compile(r"[A-Za-z]+|\d{1,3}|\s(?=\d)|[^\sA-Za-z\d]")


@dataclass(frozen=True)
class Job:
    """What decides the requests and which responses are good. One output folder holds one job."""

    model: str
    parameters: Mapping[str, Any]
    prompts: Mapping[Kind, Prompt]
    seed: int
    checks: Checks
    longest_answer: int  # tokens
    price: Price | None

    def to_json(self) -> dict[str, Any]:
        """As the raw log keeps it."""
        return {
            "model": self.model,
            "parameters": dict(self.parameters),
            "prompts": {kind: prompt.model_dump(mode="json") for kind, prompt in self.prompts.items()},
            "seed": self.seed,
            "checks": self.checks.model_dump(),
            "longest_answer": self.longest_answer,
            "price": None if self.price is None else self.price.model_dump(),
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Job:
        """What `to_json` wrote."""
        prompts = {kind: Prompt.model_validate(prompt) for kind, prompt in entry["prompts"].items()}
        price = None if entry["price"] is None else Price.model_validate(entry["price"])
        checks = Checks.model_validate(entry["checks"])
        same = {key: entry[key] for key in ("model", "parameters", "seed", "longest_answer")}
        return cls(prompts=prompts, checks=checks, price=price, **same)

    def require_same(self, recorded: Job, place: str) -> None:
        """Raises `UsageError` naming what differs from the job that an output folder holds; prices may."""
        mine, theirs = self.to_json(), recorded.to_json()
        names = [key for key in ("model", "parameters", "seed", "checks") if mine[key] != theirs[key]]
        names += [
            f"the prompt of {kind}" for kind, prompt in self.prompts.items() if recorded.prompts.get(kind) != prompt
        ]
        if names:
            raise UsageError(f"{place} holds a job with other settings ({', '.join(names)}): give another --out")


@dataclass(frozen=True)
class Item:
    """One conversation to be made. The key is a hash of all that decides its request."""

    job: Job
    kind: Kind
    scene: Scene

    @cached_property
    def key(self) -> str:
        """SHA-256 in hex of the prompt's version, the model, its parameters and the input."""
        prompt = self.job.prompts[self.kind]
        shown = self.scene.context(prompt.boxes)
        decides = [prompt.version, self.job.model, dict(self.job.parameters), self.kind, self.scene.id, shown]
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()

    def body(self) -> dict[str, Any]:
        """The request as the API takes it."""
        prompt = self.job.prompts[self.kind]
        messages = prompt.messages(self.scene.context(prompt.boxes))
        return {"model": self.job.model, "messages": messages, **self.job.parameters}

    @cached_property
    def prompt_tokens(self) -> int:
        """An estimate, for prices and rates before the endpoint has counted."""
        prompt = self.job.prompts[self.kind]
        return _prompt_tokens(prompt)[0] + estimate_tokens(self.scene.context(prompt.boxes))

    @property
    def most_prompt_tokens(self) -> int:
        """What no tokenizer passes: a token holds a byte or more."""
        prompt = self.job.prompts[self.kind]
        return _prompt_tokens(prompt)[1] + len(self.scene.context(prompt.boxes).encode())


def estimate_tokens(text: str) -> int:
    """About how many tokens a text has."""
    return len(PIECES.findall(text))


@cache
def _prompt_tokens(prompt: Prompt) -> tuple[int, int]:
    """Of a request without its context: about how many, and at most."""
    texts = [message["content"] for message in prompt.messages("")]
    return sum(estimate_tokens(text) + MESSAGE for text in texts), sum(len(text.encode()) + MESSAGE for text in texts)


def choose(job: Job, scenes: Sequence[Scene], counts: Mapping[Kind, int]) -> list[Item]:
    """Of each kind its number of scenes, at random by the seed; a larger number holds the smaller one.

    Raises `DataError` where fewer scenes have what the kind needs.
    """
    items = []
    for kind, count in counts.items():
        boxes = job.prompts[kind].boxes
        able = [scene for scene in scenes if scene.captions or (boxes and scene.objects)]
        if count > len(able):
            raise DataError(f"--count {kind}={count}: only {len(able)} images have captions for it: lower it")
        ranked = sorted(able, key=lambda scene: hashlib.sha256(f"{job.seed} {kind} {scene.id}".encode()).digest())
        items += [Item(job, kind, scene) for scene in ranked[:count]]
    return items
