"""What a generation job is made with: one YAML file, flags on top."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from anyres_vlm.config import Frozen, Positive, Rate, read_mapping, validated

Amount = Annotated[float, Field(ge=0)]
Above = Annotated[float, Field(gt=0)]


class Price(Frozen):
    """US dollars a million tokens; a batch costs `batch` times that."""

    input: Amount  # of a prompt
    output: Amount  # of an answer
    batch: Rate = 0.5  # share that a batch costs

    def cost(self, prompt_tokens: int, completion_tokens: int, batched: bool) -> float:
        """US dollars."""
        full = (prompt_tokens * self.input + completion_tokens * self.output) / 1e6
        return full * self.batch if batched else full


class Checks(Frozen):
    """When a response is rejected, and how often the model is asked again."""

    attempts: Positive = 3  # responses an item may have
    # Kinds of object that neither captions nor boxes know. One is borne: a verb, a general truth ("birds eat apples"),
    # what captions imply. Of 24 true answers written to provoke it 12 fail with none, 1 with one.
    max_absent_objects: Annotated[int, Field(ge=0)] = 1
    max_similarity: Rate = 0.7  # Jaccard similarity of the word triples of two conversations; 1 keeps all but equals


class Limits(Frozen):
    """How fast an endpoint is asked, and how patiently."""

    concurrency: Positive = 32  # requests under way at once
    requests_per_minute: Above | None = None  # None is no limit
    tokens_per_minute: Above | None = None  # None is no limit
    timeout_s: Above = 120.0  # of a request
    retries: Annotated[int, Field(ge=0)] = 6  # of a request that got no answer
    longest_wait_s: Above = 600.0  # an endpoint that asks for more ends the run
    poll_s: Above = 30.0  # between looks at a batch


class Settings(Frozen):
    """The whole configuration. `parameters` go to the endpoint as they are and are part of what a request is."""

    model: str | None = None  # to ask for; --model replaces it
    base_url: str | None = None  # None is the client's own
    key_variable: str = "OPENAI_API_KEY"  # the environment variable that holds the key
    parameters: Mapping[str, Any] = Field({"temperature": 0.7, "max_tokens": 1024})  # sent with every request
    prompts: Path | None = None  # a folder of KIND.yaml files in place of the shipped ones
    seed: Annotated[int, Field(ge=0)] = 0  # chooses the images of each kind
    limits: Limits = Limits()  # how fast it is asked
    checks: Checks = Checks()  # what is rejected
    prices: Mapping[str, Price] = Field({})  # by model

    @model_validator(mode="after")
    def _answers_end(self) -> Settings:
        if not isinstance(self.longest_answer, int) or self.longest_answer < 1:
            raise ValueError("parameters needs max_tokens or max_completion_tokens: without one a price has no bound")
        if own := {"model", "messages", "stream", "n"} & set(self.parameters):
            raise ValueError(f"parameters may not set {', '.join(sorted(own))}")
        return self

    @property
    def longest_answer(self) -> int:
        """Tokens of the longest answer that the endpoint may give."""
        return self.parameters.get("max_tokens") or self.parameters.get("max_completion_tokens") or 0


def load_settings(path: Path, flags: Mapping[str, Any]) -> Settings:
    """Read the file; flags that are not None replace its keys, `limits.concurrency` inside a section.

    Raises `UsageError` for what is unknown or out of range.
    """
    content = read_mapping(path)
    for key, value in flags.items():
        section, _, name = key.rpartition(".")
        if value is not None:
            (content.setdefault(section, {}) if section else content)[name] = value
    return validated(Settings, content, path)
