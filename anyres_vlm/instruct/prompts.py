"""The prompts of each kind of data: one YAML file a kind, versioned by its content, replaceable by a user's own."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Literal, get_args

from pydantic import field_validator

from anyres_vlm.config import Frozen, Positive, read_mapping, validated
from anyres_vlm.errors import UsageError

Kind = Literal["conversation", "detail", "reasoning"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SHIPPED = Path(__file__).parent / "prompts"


class Example(Frozen):
    """What the model is given and what a good answer to it is."""

    context: str
    response: str

    @field_validator("context", "response")
    @classmethod
    def _stripped(cls, text: str) -> str:
        return text.strip()


class Prompt(Frozen):
    """The request of one kind.

    With `questions`, the response as a whole answers one of them; without, it holds `rounds` questions with answers.
    """

    system: str
    boxes: bool  # whether the model is given boxes beside captions
    rounds: Positive = 1
    questions: tuple[str, ...] = ()
    least_words: Positive = 1  # of each answer
    examples: tuple[Example, ...] = ()

    @property
    def version(self) -> str:
        """Changes with any word of the prompt."""
        return _version(self)

    def messages(self, context: str) -> list[dict[str, str]]:
        """The chat of one request."""
        chat = [{"role": "system", "content": self.system.strip()}]
        for example in self.examples:
            chat.append({"role": "user", "content": example.context})
            chat.append({"role": "assistant", "content": example.response})
        return [*chat, {"role": "user", "content": context}]


@cache
def _version(prompt: Prompt) -> str:
    content = json.dumps(prompt.model_dump(), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def load_prompts(folder: Path | None, boxes: bool) -> dict[Kind, Prompt]:
    """A user's prompts, and the shipped ones for kinds that the folder lacks; `boxes` gives them to every kind.

    Raises `UsageError` for a file that is no prompt.
    """
    if folder is not None and not any((folder / f"{kind}.yaml").exists() for kind in KINDS):
        raise UsageError(f"prompts {folder}: expected one of {', '.join(f'{kind}.yaml' for kind in KINDS)} in it")
    prompts: dict[Kind, Prompt] = {}
    for kind in KINDS:
        own = None if folder is None else folder / f"{kind}.yaml"
        path = own if own is not None and own.exists() else SHIPPED / f"{kind}.yaml"
        prompt = validated(Prompt, read_mapping(path), path)
        if prompt.questions and prompt.rounds != 1:
            raise UsageError(f"config {path}: rounds={prompt.rounds} goes without questions: leave one of them out")
        prompts[kind] = prompt.model_copy(update={"boxes": True}) if boxes else prompt
    return prompts


def parse_kind(text: str) -> Kind:
    """A kind named on the command line. Raises `UsageError` for any other."""
    if text not in KINDS:
        raise UsageError(f"kind {text!r}: expected one of {', '.join(KINDS)}")
    return text
