"""Convert the tokenizer's own chat template to the pieces of a `Template`.

The Jinja source is not parsed. Dialogues of marker words are rendered, and the text around the markers becomes the
pieces, which must reproduce dialogues of every length; a less regular template is refused. Rendering also shows whether
the template expects text or a list of parts as the content of a message, as processors of released checkpoints do, and
what it writes for an image.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from threading import Thread
from typing import Any, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from anyres_vlm.config import TemplateName
from anyres_vlm.data.templates import BOS, EOS, TEMPLATES, Template
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.schema import IMAGE_TOKEN, Role, Turn

logger = logging.getLogger(__name__)

OWN: TemplateName = "chat_template"  # the name that stands for the tokenizer's own

PROBED_ROUNDS = 4  # the pieces must reproduce dialogues of up to this many questions and answers
PATIENCE_S = 10.0  # time limit for rendering; a template is a program that may not terminate
REMEDY = f"name another template (--template or model.template): {', '.join(TEMPLATES)}"
LEADING_IMAGES = re.compile(f"(?:{IMAGE_TOKEN}\n?)*")
CONTENTS: tuple[frozenset[Role], ...] = (frozenset(), frozenset({"user", "assistant"}), frozenset({"user"}))


@dataclass(frozen=True)
class MessageFormat:
    """How turns become messages. Text by default; as `parts`, the content of these roles is a list of parts.

    Images at the start of a question become parts of their own, which the template writes as `image`, followed by
    `before_text`. An image further back stays where the text has it. An empty `image` keeps all of them in the text.
    """

    parts: frozenset[Role] = frozenset()
    image: str = ""
    before_text: str = ""

    def messages(self, turns: Sequence[Turn], system: str) -> list[dict[str, Any]]:
        """Return the messages of a conversation for `apply_chat_template`; no system text, no system message."""
        if not system:
            return [self._message(turn) for turn in turns]
        content = [{"type": "text", "text": system}] if "assistant" in self.parts else system
        return [{"role": "system", "content": content}, *map(self._message, turns)]

    def _message(self, turn: Turn) -> dict[str, Any]:
        if turn.role not in self.parts:
            return {"role": turn.role, "content": turn.text}
        images, text = self._split(turn)
        return {"role": turn.role, "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}

    def written(self, turn: Turn) -> Turn:
        """Return the turn with its content as the template writes it."""
        if turn.role != "user" or turn.role not in self.parts:
            return turn
        images, text = self._split(turn)
        return Turn(turn.role, self.image * images + self.before_text + text)

    def _split(self, turn: Turn) -> tuple[int, str]:
        """Return the number of leading images and the text after them."""
        if turn.role != "user" or not self.image:
            return 0, turn.text
        leading = cast(re.Match[str], LEADING_IMAGES.match(turn.text)).group()
        rest = turn.text[len(leading) :].replace(IMAGE_TOKEN, self.image.strip())
        return leading.count(IMAGE_TOKEN), rest


@dataclass(frozen=True)
class OwnTemplate:
    """A converted chat template. `pieces` has an end token after each answer even if the template has none."""

    format: MessageFormat
    read: Template  # what the template writes
    pieces: Template

    def opening(self, tokenizer: PreTrainedTokenizerFast, system: str) -> str:
        """Return what the template writes before the first question of a conversation with a system text.

        Raises `DataError` if the template refuses the text, leaves it out or writes it elsewhere.
        """
        question = Turn("user", "qzx0xzq")
        try:
            text = apply_own(tokenizer, [question], True, self.format, system)
        except DataError as error:
            raise DataError(f"{error} (it has a system text)", kind="system") from None
        body = self.read.render([self.format.written(question)], True)[0].removeprefix(self.read.opening)
        opening = text.removesuffix(body)
        if not text.endswith(body) or system not in opening:
            raise DataError(
                "this llm's chat template does not write a system text before the first question: use another template",
                kind="system",
            )
        return opening

    def fault(
        self, tokenizer: PreTrainedTokenizerFast, turns: Sequence[Turn], prompt: bool, system: str = ""
    ) -> str | None:
        """Return why the template does not write these turns as its pieces do; None if it does."""
        answers = sum(turn.role == "assistant" for turn in turns)
        past = self.read.past
        if not prompt and answers > 1 and past is not None and not past.startswith(self.read.prompt_suffix):
            return (
                f"this llm's chat template ends its prompt with {self.read.prompt_suffix!r}, but writes {past!r} "
                "before earlier answers, so only records with one answer can have exact labels: use another template"
            )
        try:
            text = apply_own(tokenizer, turns, prompt, self.format, system)
            read = replace(self.read, opening=self.opening(tokenizer, system)) if system else self.read
        except DataError as error:
            return str(error)
        if text != read.render([self.format.written(turn) for turn in turns], prompt)[0]:
            return "this llm's chat template changes the turns' text: use another template"
        return None


def _unfit(reason: str) -> UsageError:
    """Return the error for a chat template that cannot be used."""
    return UsageError(f"template {OWN}: {reason}: {REMEDY}")


def chat_jinja(template: TemplateName, tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the Jinja source to save with a checkpoint. Raises `UsageError` if the tokenizer should have one."""
    if template != OWN:
        return _with_begin(TEMPLATES[template], tokenizer).jinja
    if tokenizer.chat_template is None:
        raise _unfit("this llm's tokenizer has no chat template")
    try:
        return cast(str, tokenizer.get_chat_template())
    except ValueError:  # several templates, none of them the default
        raise _unfit("this llm's tokenizer has several chat templates and no default") from None


def resolve_template(template: TemplateName, tokenizer: PreTrainedTokenizerFast) -> Template:
    """Return the pieces of a template of this package with the tokens of this tokenizer inserted.

    Raises `UsageError` for a token that the tokenizer lacks.
    """
    pieces = _with_begin(TEMPLATES[template], tokenizer)
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


def _with_begin(pieces: Template, tokenizer: PreTrainedTokenizerFast) -> Template:
    """Return the pieces with the begin token in front if the format has it and the tokenizer does not add its own."""
    if not pieces.begins or tokenizer.bos_token is None:
        return pieces
    backend = tokenizer.backend_tokenizer
    if backend.padding is not None:  # saved with the tokenizer; left padding would come before the begin token
        backend.no_padding()
    adds = backend.encode("x", add_special_tokens=True).ids[:1] == [tokenizer.bos_token_id]
    return pieces if adds else replace(pieces, opening=BOS + pieces.opening)


def apply_own(
    tokenizer: PreTrainedTokenizerFast,
    turns: Sequence[Turn],
    prompt: bool = False,
    format: MessageFormat = MessageFormat(),
    system: str = "",
) -> str:
    """Return what the tokenizer's own template writes. Raises `DataError` with the template's words if it refuses."""
    messages = format.messages(turns, system)
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except Exception as error:  # a template is a program: it can raise anything
        raise DataError(f"this llm's chat template cannot write it: {' '.join(str(error).split())}") from error
    return cast(str, text)


def read_own(tokenizer: PreTrainedTokenizerFast) -> OwnTemplate:
    """Read the tokenizer's own chat template. Raises `UsageError` for one that cannot be exact, with the reason."""
    if "strftime_now" in chat_jinja(OWN, tokenizer):
        raise _unfit("this llm's chat template writes today's date")
    format = _message_format(tokenizer)
    marked = [
        turn for n in range(PROBED_ROUNDS) for turn in (Turn("user", f"qzx{n}xzq"), Turn("assistant", f"azx{n}xza"))
    ]
    rendered = _render(tokenizer, [marked[:count] for count in range(1, len(marked) + 1)], format)
    if isinstance(rendered, DataError):
        raise _unfit(str(rendered))
    read = _pieces(rendered, marked, tokenizer)
    for count, text in enumerate(rendered, start=1):
        if read.render(marked[:count], count % 2 == 1)[0] != text:
            raise _unfit("this llm's chat template writes a turn differently once more turns follow")
    if format.parts:
        format, read = _with_images(tokenizer, format, read)
    if read.end:
        return OwnTemplate(format, read, read)
    warn_of_added_end(tokenizer.eos_token)
    return OwnTemplate(format, read, replace(read, end=tokenizer.eos_token))


@cache
def warn_of_added_end(end: str) -> None:
    """Warn once per end token that it is added to the template."""
    logger.warning(
        "this llm's chat template ends answers with no token: the tokenizer's %r follows each answer, in training and "
        "in prompts; stock transformers leaves it out of earlier answers",
        end,
    )


def _message_format(tokenizer: PreTrainedTokenizerFast) -> MessageFormat:
    """Find the message format by rendering a question and its answer in each. Raises `UsageError` if none works."""
    errors: list[DataError] = []
    for roles in CONTENTS:
        # The line break detects a template that prints the list itself, where it appears as a backslash and an n.
        words = ["qzx\nxzq", "azx\nxza"] if roles else ["qzxxzq", "azxxza"]
        dialogue = [Turn("user", words[0]), Turn("assistant", words[1])]
        found = _render(tokenizer, [dialogue], MessageFormat(roles))
        if isinstance(found, DataError):
            errors.append(found)
        elif all(found[0].count(word) == 1 for word in words):
            return MessageFormat(roles)
    if len(errors) < len(CONTENTS):
        raise _unfit("this llm's chat template leaves out or repeats turns")
    # An error raised by the template itself is the reason; another one may be due to the wrong message format.
    raised = [error for error in errors if type(error.__cause__) is TemplateError]
    raise _unfit(str((raised or errors)[0]))


def _render(
    tokenizer: PreTrainedTokenizerFast, dialogues: Sequence[Sequence[Turn]], format: MessageFormat
) -> list[str] | DataError:
    """Render each dialogue, as a prompt if a question is last, or return the template's error.

    Raises `UsageError` for a template that does not terminate, whose thread is left running.
    """
    outcome: list[list[str] | DataError] = []

    def render() -> None:
        try:
            outcome.append([apply_own(tokenizer, turns, turns[-1].role == "user", format) for turns in dialogues])
        except DataError as error:
            outcome.append(error)

    thread = Thread(target=render, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    if not outcome:
        raise _unfit(f"this llm's chat template is not done after {PATIENCE_S:g} s")
    return outcome[0]


def _pieces(rendered: Sequence[str], marked: Sequence[Turn], tokenizer: PreTrainedTokenizerFast) -> Template:
    """Split a prompt and a dialogue of two rounds into pieces. Raises `UsageError` if they do not fit together."""
    prompt, dialogue = rendered[0], rendered[3]
    words = [turn.text for turn in marked[:4]]
    if any(dialogue.count(word) != 1 for word in words) or prompt.count(words[0]) != 1:
        raise _unfit("this llm's chat template leaves out or repeats turns")
    opening, past, follow, question, closing = re.split("|".join(words), dialogue)
    suffix = prompt[len(opening) + len(words[0]) :]
    if not prompt.startswith(opening) or not question.startswith(suffix):
        raise _unfit("this llm's generation prompt is not what its dialogues begin with")
    if not follow.startswith(closing):
        raise _unfit("this llm's chat template ends the last answer in its own way")
    added = [re.escape(token.content) for token in tokenizer.added_tokens_decoder.values()]
    tokens = "|".join(sorted(added, key=len, reverse=True))
    end = re.match(rf"\s*({tokens})", closing) if added else None
    if end is None and (tokenizer.eos_token is None or (added and re.search(tokens, closing))):
        raise _unfit("this llm's chat template writes no end token after an answer")
    return Template(
        opening=opening,
        again=follow.removeprefix(closing),
        user_suffix=suffix,
        lead=question.removeprefix(suffix),
        end=end.group() if end else "",
        between=closing[end.end() :] if end else closing,
        past=None if past == question else past,
    )


def _with_images(
    tokenizer: PreTrainedTokenizerFast, format: MessageFormat, read: Template
) -> tuple[MessageFormat, Template]:
    """Return the format with the text that the template writes for an image part, if it has one `<image>` in front.

    The text between an image and the question moves from the pieces into the format.
    """
    question = Turn("user", "qzx0xzq")
    found = _render(tokenizer, [[Turn("user", f"{IMAGE_TOKEN}\n{question.text}")]], replace(format, image=IMAGE_TOKEN))
    if isinstance(found, DataError) or found[0].count(IMAGE_TOKEN) != 1:
        return format, read
    before, _, after = found[0].partition(question.text)
    kept = len(os.path.commonprefix([before, read.opening]))  # noqa: RUF071 (of characters)
    before_text = read.opening[kept:]
    image = before[kept : len(before) - len(before_text)]
    if after != read.user_suffix or IMAGE_TOKEN not in image or not read.again.endswith(before_text):
        return format, read
    moved = replace(read, opening=read.opening[:kept], again=read.again.removesuffix(before_text))
    return replace(format, image=image, before_text=before_text), moved
