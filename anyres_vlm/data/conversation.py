"""Tokenise conversations, with exact labels.

A conversation is tokenised once, as one string; the labels are computed from the characters that each token covers.
For every answer:

- The supervised tokens are those from the first one after the prompt to the end token, both included: the template's
  `lead` (a space, which SentencePiece merges into the first word: `▁Hello`), the answer and the template's `end`. The
  end is a separate token, so the last label contains nothing of the next turn.
- The ids before them are exactly those of `prompt`, so training and generation see the same context.
- They decode to the answer, up to canonical equivalence of Unicode.

A record for which this is impossible is rejected with the reason. Examples are a line break that the tokenizer merges
with one of the prompt, a character it cannot represent, and a tokenizer that changes case.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding
from transformers import PreTrainedTokenizerFast

from anyres_vlm.config import ImagePosition, TemplateName
from anyres_vlm.data.chat_template import OWN, OwnTemplate, read_own, resolve_template
from anyres_vlm.data.templates import Span, Template
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.schema import IGNORE_INDEX, IMAGE_TOKEN, Record, Role, Turn

Ids = NDArray[np.int32]

HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # a lone surrogate: possible in JSON, but not in a tokenizer's input
ASCII_PROBE = f"It's 12.50,  \n\n\tof   (A) \n{''.join(map(chr, range(128)))}."


def images_first(turns: Sequence[Turn]) -> Sequence[Turn]:
    """Move the only `<image>` of each question to its start, on a separate line, as LLaVA-NeXT does before training.

    Questions with several images, or with the image at the start already, do not change. If no question changes, the
    result is `turns` itself.
    """
    if not any(map(_has_image_to_move, turns)):
        return turns
    return tuple(
        Turn(turn.role, f"{IMAGE_TOKEN}\n{turn.text.replace(IMAGE_TOKEN, '').strip()}".strip())
        if _has_image_to_move(turn)
        else turn
        for turn in turns
    )


def _has_image_to_move(turn: Turn) -> bool:
    is_question = turn.role == "user" and not turn.text.startswith(IMAGE_TOKEN)
    return is_question and turn.text.count(IMAGE_TOKEN) == 1


@dataclass(frozen=True)
class ConversationTokenizer:
    """Renders and tokenises conversations with a template and a tokenizer; `image_position` places images first."""

    template: TemplateName
    tokenizer: PreTrainedTokenizerFast
    image_position: ImagePosition = "as_is"

    @property
    def end(self) -> str:
        """The text that ends an answer."""
        return self._pieces.end

    @property
    def lead(self) -> str:
        """The supervised text before an answer, which a trained model generates first."""
        return self._pieces.lead

    @property
    def keeps_text(self) -> bool:
        """Whether the template writes the text of questions and the system text, not only the images."""
        return self._pieces.user_text

    @cached_property
    def end_id(self) -> int:
        """The token that ends an answer. Raises `UsageError` if the tokenizer has no such token."""
        token: int | None = self.tokenizer.convert_tokens_to_ids(self._end_token)
        is_unknown = token == self.tokenizer.unk_token_id and self._end_token != self.tokenizer.unk_token
        if token is None or is_unknown:  # GPT-2's tokenizer and its kin have one token for both
            raise UsageError(
                f"template {self.template} ends answers with {self._end_token!r}, which is not a token of this llm"
            )
        return token

    @property
    def stop_ids(self) -> list[int]:
        """The tokens at which generation stops: the one that ends an answer and the tokenizer's EOS token."""
        own = self.tokenizer.eos_token_id
        return sorted({self.end_id} if own is None else {self.end_id, own})

    @cached_property
    def image_token_id(self) -> int:
        """The token that stands for an image."""
        return int(self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))

    def render(self, turns: Sequence[Turn], prompt: bool = False, system: str = "") -> tuple[str, list[Span]]:
        """Return the conversation as text and the supervised spans; `prompt` opens the next answer.

        Raises `DataError` for a system text that the template cannot write.
        """
        pieces, turns = self._pieces, self.place_images(turns)
        if self._own is not None:
            turns = [self._own.format.written(turn) for turn in turns]
            if system:
                pieces, system = replace(pieces, opening=self._own.opening(self.tokenizer, system)), ""
        return pieces.render(turns, prompt, system)

    def place_images(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        """Return the turns with each image where `image_position` puts it."""
        return images_first(turns) if self.image_position == "front" else turns

    def encode(self, records: Sequence[Record]) -> list[tuple[Ids, Ids] | DataError]:
        """Return token ids and labels of each record, or the error that prevents them. An image is one token."""
        results: list[tuple[Ids, Ids] | DataError | None] = []
        texts: list[str] = []
        rendered = []
        for index, record in enumerate(records):
            name = f"record {record.id}"
            try:
                text, spans = self.render(record.turns, system=record.system)
            except DataError as error:
                results.append(DataError(f"{name}: {error}", kind=error.kind))
                continue
            fault = self._fault(name, record.turns, text, record.system)
            results.append(fault)
            if fault is None:
                texts.append(text)
                rendered.append((index, spans))
        for (index, spans), text, encoding in zip(rendered, texts, self._tokenise(texts), strict=True):
            try:
                results[index] = self._label(text, spans, encoding)
            except DataError as error:
                results[index] = DataError(f"record {records[index].id}: {error}")
        return [result for result in results if result is not None]

    def prompt(self, turns: Sequence[Turn], system: str = "") -> Ids:
        """Return the token ids before the next answer, an image as one token. Raises `DataError` for forged tokens."""
        text = self.render(turns, True, system)[0]
        if fault := self._fault("the conversation", turns, text, system, prompt=True):
            raise fault
        return np.array(self._tokenise([text])[0].ids, np.int32)

    @cached_property
    def _pieces(self) -> Template:
        return self._own.pieces if self._own is not None else resolve_template(self.template, self.tokenizer)

    @cached_property
    def _own(self) -> OwnTemplate | None:
        return read_own(self.tokenizer) if self.template == OWN else None

    @cached_property
    def _end_token(self) -> str:
        return self.end.lstrip()

    @cached_property
    def _control(self) -> dict[Role, re.Pattern[str]]:
        """Control tokens that the text of a role must not contain, because they could forge a turn or an image."""
        written = "".join(piece for piece in astuple(self._pieces) if isinstance(piece, str))
        added = self.tokenizer.added_tokens_decoder.values()
        tokens = {token.content for token in added if token.special or token.content in written}
        tokens |= {self._end_token, *self.tokenizer.all_special_tokens}
        forbidden: dict[Role, set[str]] = {"user": tokens - {IMAGE_TOKEN}, "assistant": tokens}
        return {role: re.compile("|".join(map(re.escape, sorted(names)))) for role, names in forbidden.items()}

    @cached_property
    def _tail(self) -> list[int]:
        """The last ids of every prompt: those of the template's text between a question and its answer."""
        tail = self._pieces.user_suffix + self._pieces.assistant_prefix or IMAGE_TOKEN
        encoding = self._tokenise([f"x{tail}"])[0]
        first = encoding.char_to_token(1)
        return encoding.ids[first:]

    @cached_property
    def _writes_ascii(self) -> bool:
        """Whether an answer with all ASCII characters decodes to itself."""
        text, spans = self.render((Turn("user", "x"), Turn("assistant", ASCII_PROBE)))
        encoding = self._tokenise([text])[0]
        try:
            first, stop = self._supervised(text, spans[0], encoding, encoding.ids)
        except DataError:
            return False
        return self._decodes(encoding.ids[first:stop], text[slice(*spans[0])])

    def _tokenise(self, texts: Sequence[str]) -> list[Encoding]:
        """Return one encoding per text. The tokenizer adds its begin token unless the template has written it.

        Transformers' processors, with which a checkpoint is served, do the same.
        """
        backend = self.tokenizer.backend_tokenizer
        if backend.truncation is not None:
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        bos: str | None = self.tokenizer.bos_token
        written = bos is not None and self._pieces.opening.startswith(bos)
        encodings: list[Encoding] = backend.encode_batch(list(texts), add_special_tokens=not written)
        return encodings

    def _fault(
        self, name: str, turns: Sequence[Turn], text: str, system: str, prompt: bool = False
    ) -> DataError | None:
        """Return what is wrong with a conversation before it is tokenised."""
        if system and self.keeps_text and (found := self._control["assistant"].search(system)):
            words = f"the system text contains the control token {found.group()!r}"
            return DataError(f"{name}: {words}", kind="control_token")
        for turn in turns:
            if found := self._control[turn.role].search(turn.text):
                words = f"the {turn.role}'s text contains the control token {found.group()!r}"
                return DataError(f"{name}: {words}", kind="control_token")
        if not text.isascii() and (half := HALF_CHARACTER.search(text)):
            return DataError(f"{name}: the text contains half a character, {half.group()!a}: write it as UTF-8")
        own, placed = self._own, self.place_images(turns)
        if own is not None and (reason := own.fault(self.tokenizer, placed, prompt, system)):
            return DataError(f"{name}: {reason}")
        return None

    def _label(self, text: str, spans: Sequence[Span], encoding: Encoding) -> tuple[Ids, Ids]:
        """Return ids and labels of one conversation. Raises `DataError` if the labels would not be exact."""
        tokens = encoding.ids
        ids = np.array(tokens, np.int32)
        labels = np.full_like(ids, IGNORE_INDEX)
        for span in spans:
            first, stop = self._supervised(text, span, encoding, tokens)
            written = text[slice(*span)]
            if not (written.isascii() and self._writes_ascii) and not self._decodes(tokens[first:stop], written):
                raise DataError(f"this llm's tokenizer cannot write {_shorten(written)} as it is")
            labels[first:stop] = ids[first:stop]
        return ids, labels

    def _supervised(self, text: str, span: Span, encoding: Encoding, ids: list[int]) -> tuple[int, int]:
        """Return the range of the supervised tokens of one answer: the first one after the prompt, and the end.

        If the tokens before the answer are those of every prompt and the last one ends where the answer begins, the
        answer did not affect them: neither the merges of BPE nor the best path of a unigram model depends on text after
        a boundary that no token crosses. Otherwise, the prompt is tokenised on its own and compared.
        """
        begin, end = span[0], span[1] - len(self._end_token)
        first, last = encoding.char_to_token(begin), encoding.char_to_token(end)
        if last is None or ids[last] != self.end_id or _chars(encoding, last)[0] != end:
            raise DataError(f"{self._end_token!r} after {_shorten(text[begin:end])} is not a separate token")
        tail = self._tail
        if first is None or _chars(encoding, first)[0] != begin or ids[max(first - len(tail), 0) : first] != tail:
            prompt = self._tokenise([text[:begin]])[0].ids
            first = len(prompt)
            if ids[:first] != prompt or (first and _chars(encoding, first - 1)[1] > begin):
                raise DataError(
                    f"the tokens of the prompt and of the answer {_shorten(text[begin:end])} depend on each other, so "
                    "training would not see what generation sees: use another template"
                )
        return first, last + 1

    def _decodes(self, ids: list[int], written: str) -> bool:
        """Return whether ids, the end token last, decode to the text; a decoder may drop the first space."""
        decoded = self.tokenizer.backend_tokenizer.decode(ids[:-1], skip_special_tokens=False)
        expected = written.removesuffix(self._end_token)
        return unicodedata.normalize("NFC", decoded).lstrip(" ") == unicodedata.normalize("NFC", expected).lstrip(" ")


def _chars(encoding: Encoding, token: int) -> Span:
    """Return the span of characters of a token; (0, 0) for a token that the tokenizer added."""
    span: Span | None = encoding.token_to_chars(token)
    return span or (0, 0)


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")
