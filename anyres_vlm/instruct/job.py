"""Settings, prompts and items of a generation job."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from anyres_vlm.config import Frozen, Positive, Rate, read_mapping, validated
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.instruct.annotations import Scene

Amount = Annotated[float, Field(ge=0)]
Above = Annotated[float, Field(gt=0)]


class Price(Frozen):
    """Prices in US dollars per million tokens; a batch costs `batch` times that."""

    input: Amount  # per million prompt tokens
    output: Amount  # per million answer tokens
    batch: Rate = 0.5  # factor for requests sent through the Batch API

    def cost(self, prompt_tokens: int, completion_tokens: int, batched: bool) -> float:
        """Return the cost in US dollars."""
        full = (prompt_tokens * self.input + completion_tokens * self.output) / 1e6
        return full * self.batch if batched else full


class Checks(Frozen):
    """Checks of a response, and the number of attempts."""

    attempts: Positive = 3  # responses per item, the first included
    # Categories of objects in an answer that neither captions nor boxes mention. One is accepted because a word may be
    # a verb, a general statement ("birds eat apples") or implied by a caption: of 24 true answers written to trigger
    # the check, 12 fail with a limit of 0 and 1 with a limit of 1.
    max_absent_objects: Annotated[int, Field(ge=0)] = 1
    max_similarity: Rate = 0.7  # Jaccard similarity of the word triples of two conversations; 1 drops only equal ones


class Limits(Frozen):
    """Request rates, timeouts and retries."""

    concurrency: Positive = 32  # requests sent at the same time
    requests_per_minute: Above | None = None  # None: no limit
    tokens_per_minute: Above | None = None  # None: no limit
    timeout_s: Above = 120.0  # of one request
    retries: Annotated[int, Field(ge=0)] = 6  # of a request without an answer
    longest_wait_s: Above = 600.0  # a longer Retry-After ends the run
    poll_s: Above = 30.0  # between two polls of a batch


class Settings(Frozen):
    """The whole configuration. `parameters` are sent to the endpoint unchanged and are part of a request's key."""

    model: str | None = None  # model name; --model overrides it
    base_url: str | None = None  # None: the openai client's default
    key_variable: str = "OPENAI_API_KEY"  # environment variable with the API key
    parameters: Mapping[str, Any] = Field({"temperature": 0.7, "max_tokens": 1024})  # sent with every request
    prompts: Path | None = None  # folder of KIND.yaml files that replace the shipped ones
    seed: Annotated[int, Field(ge=0)] = 0  # of the choice of images for each kind
    limits: Limits = Limits()  # rates, timeouts and retries
    checks: Checks = Checks()  # when a response is rejected
    prices: Mapping[str, Price] = Field({})  # by model name

    @model_validator(mode="after")
    def _answers_end(self) -> Settings:
        if not isinstance(self.longest_answer, int) or self.longest_answer < 1:
            raise ValueError("parameters needs max_tokens or max_completion_tokens: otherwise costs have no bound")
        if own := {"model", "messages", "stream", "n"} & set(self.parameters):
            raise ValueError(f"parameters may not set {', '.join(sorted(own))}")
        return self

    @property
    def longest_answer(self) -> int:
        """Return the token limit of an answer."""
        return self.parameters.get("max_tokens") or self.parameters.get("max_completion_tokens") or 0


def load_settings(path: Path, flags: Mapping[str, Any]) -> Settings:
    """Read the file and override its keys with the flags that are not None; a dot addresses a key in a section.

    Raises `UsageError` for an unknown key or a value out of range.
    """
    content = read_mapping(path)
    for key, value in flags.items():
        section, _, name = key.rpartition(".")
        if value is not None:
            (content.setdefault(section, {}) if section else content)[name] = value
    return validated(Settings, content, path)


Kind = Literal["conversation", "detail", "reasoning"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SHIPPED = Path(__file__).parent / "prompts"


class Example(Frozen):
    """An example of a description and a good response to it."""

    context: str
    response: str

    @field_validator("context", "response")
    @classmethod
    def _stripped(cls, text: str) -> str:
        return text.strip()


class Prompt(Frozen):
    """The prompt for one kind of data, from its YAML file.

    With `questions`, the whole response is the answer to one of them; without, it has `rounds` questions with answers.
    """

    system: str
    boxes: bool  # whether the description includes boxes
    rounds: Positive = 1
    questions: tuple[str, ...] = ()
    least_words: Positive = 1  # of each answer
    examples: tuple[Example, ...] = ()

    @cached_property
    def version(self) -> str:
        """Return a hash of the prompt's content."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()[:12]

    @cached_property
    def tokens(self) -> tuple[int, int]:
        """Return the estimate and the upper bound of a request's tokens without its description."""
        texts = [message["content"] for message in self.messages("")]
        estimated = sum(estimate_tokens(text) + MESSAGE for text in texts)
        return estimated, sum(len(text.encode()) + MESSAGE for text in texts)

    def messages(self, context: str) -> list[dict[str, str]]:
        """Return the chat messages of one request."""
        chat = [{"role": "system", "content": self.system.strip()}]
        for example in self.examples:
            chat.append({"role": "user", "content": example.context})
            chat.append({"role": "assistant", "content": example.response})
        return [*chat, {"role": "user", "content": context}]


def load_prompts(folder: Path | None, boxes: bool) -> dict[Kind, Prompt]:
    """Return the prompts in a folder, and the shipped ones for the kinds it lacks; `boxes` adds boxes to every kind.

    Raises `UsageError` for an invalid prompt.
    """
    if folder is not None and not any((folder / f"{kind}.yaml").exists() for kind in KINDS):
        raise UsageError(f"prompts {folder}: expected one of {', '.join(f'{kind}.yaml' for kind in KINDS)} in it")
    prompts: dict[Kind, Prompt] = {}
    for kind in KINDS:
        own = None if folder is None else folder / f"{kind}.yaml"
        path = own if own is not None and own.exists() else SHIPPED / f"{kind}.yaml"
        prompt = validated(Prompt, read_mapping(path), path)
        if prompt.questions and prompt.rounds != 1:
            raise UsageError(f"config {path}: rounds={prompt.rounds} and questions exclude each other: remove one")
        prompts[kind] = prompt.model_copy(update={"boxes": True}) if boxes else prompt
    return prompts


def parse_kind(text: str) -> Kind:
    """Return a kind named on the command line. Raises `UsageError` for an unknown one."""
    if text not in KINDS:
        raise UsageError(f"kind {text!r}: expected one of {', '.join(KINDS)}")
    return text


MESSAGE = 4  # tokens that the chat format adds to each message
# Pieces that byte-pair tokenizers rarely split further. For the shipped prompts with 0 to 40 boxes the count is 95% to
# 99% of that of GPT-4's and GPT-4o's tokenizers. Scripts other than Latin count one token per character, which is about
# GPT-4o's count or more, except for emoji (GPT-4o needs half as many again).
PIECES = re.compile(r"[A-Za-z]+|\d{1,3}|\s(?=\d)|[^\sA-Za-z\d]")


class Job(Frozen):
    """Everything that determines the requests and which responses are accepted. An output folder holds one job."""

    model: str
    parameters: Mapping[str, Any]
    prompts: Mapping[Kind, Prompt]
    seed: int
    checks: Checks
    longest_answer: int  # tokens
    price: Price | None

    def require_same(self, recorded: Job, place: str) -> None:
        """Raise `UsageError` naming the differences from the job in an output folder; prices may differ."""
        names = [
            key for key in ("model", "parameters", "seed", "checks") if getattr(self, key) != getattr(recorded, key)
        ]
        names += [
            f"the prompt of {kind}" for kind, prompt in self.prompts.items() if recorded.prompts.get(kind) != prompt
        ]
        if names:
            raise UsageError(f"{place} holds a job with other settings ({', '.join(names)}): give another --out")


@dataclass(frozen=True)
class Item:
    """One conversation to generate. The key is a hash of everything that determines its request."""

    job: Job
    kind: Kind
    scene: Scene

    @property
    def prompt(self) -> Prompt:
        """Return the prompt of the kind."""
        return self.job.prompts[self.kind]

    @property
    def context(self) -> str:
        """Return the description of the image in the request."""
        return self.scene.context(self.prompt.boxes)

    @cached_property
    def key(self) -> str:
        """Return the SHA-256 in hex of the prompt's version, the model, its parameters and the description."""
        parts = [self.prompt.version, self.job.model, self.job.parameters, self.kind, self.scene.id, self.context]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def body(self) -> dict[str, Any]:
        """Return the request body for the API."""
        return {"model": self.job.model, "messages": self.prompt.messages(self.context), **self.job.parameters}

    @cached_property
    def prompt_tokens(self) -> int:
        """Return an estimate of the prompt's tokens, for prices and rates until the endpoint reports its count."""
        return self.prompt.tokens[0] + estimate_tokens(self.context)

    @property
    def most_prompt_tokens(self) -> int:
        """Return an upper bound for any tokenizer: a token has at least one byte."""
        return self.prompt.tokens[1] + len(self.context.encode())


def estimate_tokens(text: str) -> int:
    """Estimate the number of tokens in a text."""
    return len(PIECES.findall(text))


def choose(job: Job, scenes: Sequence[Scene], counts: Mapping[Kind, int]) -> list[Item]:
    """Choose the given number of scenes for each kind, at random by the seed; a larger count includes a smaller one.

    Raises `DataError` if too few scenes have what the kind needs.
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
