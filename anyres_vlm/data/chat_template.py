"""The tokenizer's own chat template, read into the same pieces as the templates of this package.

The Jinja source is not parsed: dialogues of marker words are rendered, the pieces around the markers are taken and must
give the same text for dialogues of every length. What is not that regular is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields, replace
from threading import Thread
from typing import Any, cast

from transformers import PreTrainedTokenizerFast

from anyres_vlm.config import TemplateName
from anyres_vlm.data.templates import BOS, EOS, TEMPLATES, Template
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.schema import Turn

OWN: TemplateName = "chat_template"  # the name that stands for the tokenizer's own

PROBED_ROUNDS = 4  # dialogues of one to so many questions and answers must have the same pieces
PATIENCE_S = 10.0  # a template is a program: one that does not end is given up after so long
REMEDY = f"use another template: {', '.join(TEMPLATES)}"


def chat_jinja(template: TemplateName, tokenizer: PreTrainedTokenizerFast) -> str:
    """The Jinja source that a checkpoint is saved with. Raises `UsageError` if the tokenizer should have one."""
    if template != OWN:
        return TEMPLATES[template].jinja
    if tokenizer.chat_template is None:
        raise UsageError(f"template {OWN}: this llm's tokenizer has no chat template: {REMEDY}")
    return cast(str, tokenizer.get_chat_template())


def resolve_template(template: TemplateName, tokenizer: PreTrainedTokenizerFast) -> Template:
    """The pieces with this tokenizer's own tokens in them.

    Raises `UsageError` for a token that the tokenizer lacks and for an own template that cannot be exact.
    """
    if template == OWN:
        return _read(tokenizer)
    pieces = TEMPLATES[template]
    changes: dict[str, Any] = {}
    for field in fields(pieces):
        text = getattr(pieces, field.name)
        for placeholder, name in ((BOS, "bos_token"), (EOS, "eos_token")):
            if isinstance(text, str) and placeholder in text:
                token = getattr(tokenizer, name)
                if token is None:
                    raise UsageError(f"template {template} needs the {name}, which this llm's tokenizer lacks")
                changes[field.name] = text = text.replace(placeholder, token)
    return replace(pieces, **changes)


def apply_own(tokenizer: PreTrainedTokenizerFast, turns: Sequence[Turn], prompt: bool = False, system: str = "") -> str:
    """Return what the tokenizer's own template writes. Raises `DataError` with the template's words if it refuses."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": turn.role, "content": turn.text} for turn in turns]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except Exception as error:  # a template is a program: it can raise what it likes
        raise DataError(f"this llm's chat template cannot write it: {' '.join(str(error).split())}") from None
    return cast(str, text)


def own_opening(tokenizer: PreTrainedTokenizerFast, pieces: Template, system: str) -> str:
    """Return what the tokenizer's own template writes before the first question of a conversation with a system text.

    Raises `DataError` where the template refuses the text, leaves it out or writes it elsewhere.
    """
    question = Turn("user", "qzx0xzq")
    try:
        text = apply_own(tokenizer, [question], True, system=system)
    except DataError as error:
        raise DataError(f"{error} (it has a system text)", kind="system") from None
    body = pieces.render([question], True)[0].removeprefix(pieces.opening)
    opening = text.removesuffix(body)
    if not text.endswith(body) or system not in opening:
        raise DataError(
            "this llm's chat template does not write a system text before the first question: use another template",
            kind="system",
        )
    return opening


def _read(tokenizer: PreTrainedTokenizerFast) -> Template:
    if "strftime_now" in chat_jinja(OWN, tokenizer):
        raise UsageError(f"template {OWN}: this llm's chat template writes today's date: {REMEDY}")
    marked = [
        turn for n in range(PROBED_ROUNDS) for turn in (Turn("user", f"qzx{n}xzq"), Turn("assistant", f"azx{n}xza"))
    ]
    rendered = _render(tokenizer, [marked[:count] for count in range(1, len(marked) + 1)])
    pieces = _pieces(rendered, marked, tokenizer)
    for count, text in enumerate(rendered, start=1):
        if pieces.render(marked[:count], count % 2 == 1)[0] != text:
            raise UsageError(
                f"template {OWN}: this llm's chat template writes a turn differently as the dialogue goes on: {REMEDY}"
            )
    return pieces


def _render(tokenizer: PreTrainedTokenizerFast, dialogues: Sequence[Sequence[Turn]]) -> list[str]:
    """Each dialogue as the template writes it, a prompt where a question is last. Its thread can be left behind."""
    outcome: list[list[str] | DataError] = []

    def render() -> None:
        try:
            outcome.append([apply_own(tokenizer, turns, turns[-1].role == "user") for turns in dialogues])
        except DataError as error:
            outcome.append(error)

    thread = Thread(target=render, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    found = outcome[0] if outcome else DataError(f"this llm's chat template is not done after {PATIENCE_S:g} s")
    if isinstance(found, DataError):
        raise UsageError(f"template {OWN}: {found}: {REMEDY}")
    return found


def _pieces(rendered: Sequence[str], marked: Sequence[Turn], tokenizer: PreTrainedTokenizerFast) -> Template:
    """The pieces of a prompt and of a dialogue of two rounds. Raises `UsageError` if they do not fit together."""
    prompt, dialogue = rendered[0], rendered[3]
    words = [turn.text for turn in marked[:4]]
    if any(dialogue.count(word) != 1 for word in words) or prompt.count(words[0]) != 1:
        raise UsageError(f"template {OWN}: this llm's chat template leaves out or repeats turns: {REMEDY}")
    opening, question, follow, _, closing = re.split("|".join(words), dialogue)
    suffix = prompt[len(opening) + len(words[0]) :]
    if not prompt.startswith(opening) or not question.startswith(suffix):
        raise UsageError(f"template {OWN}: this llm's generation prompt is not what its dialogues begin with: {REMEDY}")
    added = [re.escape(token.content) for token in tokenizer.added_tokens_decoder.values()]
    end = re.match(rf"\s*({'|'.join(sorted(added, key=len, reverse=True))})", closing)
    if end is None or not added:
        raise UsageError(f"template {OWN}: this llm's chat template writes no end token behind an answer: {REMEDY}")
    if not follow.startswith(closing):
        raise UsageError(f"template {OWN}: this llm's chat template ends the last answer in its own way: {REMEDY}")
    return Template(
        opening=opening,
        again=follow.removeprefix(closing),
        user_suffix=suffix,
        lead=question.removeprefix(suffix),
        end=end.group(),
        between=closing[end.end() :],
    )
