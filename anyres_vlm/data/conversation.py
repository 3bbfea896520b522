"""From turns to token ids and exact labels.

A conversation is tokenised once, as the whole string that it is; the labels follow from the characters that each token
covers. A token that would be half supervised is refused with the record's id, never guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from anyres_vlm.config import TemplateName
from anyres_vlm.data.templates import EOS, TEMPLATES
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.schema import IGNORE_INDEX, IMAGE_TOKEN, Record, Turn

Span = tuple[int, int]  # first character, end
Ids = NDArray[np.int32]


@dataclass(frozen=True)
class ConversationTokenizer:
    """A template together with a tokenizer."""

    template: TemplateName
    tokenizer: PreTrainedTokenizerFast

    @property
    def end(self) -> str:
        """The text that ends an answer."""
        end = TEMPLATES[self.template].end
        return self._eos if end == EOS else end

    @property
    def end_id(self) -> int:
        """The token that ends an answer. Raises `UsageError` if the tokenizer has no such token."""
        token: int | None = self.tokenizer.convert_tokens_to_ids(self.end)
        if token is None or token == self.tokenizer.unk_token_id:
            raise UsageError(
                f"template {self.template} ends answers with {self.end!r}, which is not a token of this llm"
            )
        return token

    def render(self, turns: Sequence[Turn], prompt: bool = False) -> tuple[str, list[Span]]:
        """The conversation as text and the supervised spans; `prompt` opens the next answer."""
        template = TEMPLATES[self.template]
        text, spans = template.opening, []
        for turn in turns:
            if turn.role == "user":
                words = turn.text if template.user_text else IMAGE_TOKEN * turn.text.count(IMAGE_TOKEN)
                text += template.user_prefix + words + template.user_suffix
            else:
                text += template.assistant_prefix
                start = len(text)
                text += template.lead + turn.text + self.end
                spans.append((start, len(text)))
                text += template.between
        return text + template.assistant_prefix * prompt, spans

    def encode(self, records: Sequence[Record]) -> list[tuple[Ids, Ids] | DataError]:
        """Token ids and labels of each record, or why it has none. An image is one token."""
        checked = [self._forged(f"record {record.id}", record.turns) for record in records]
        rendered = [self.render(record.turns) for record in records]
        batch = self.tokenizer([text for text, _ in rendered], return_offsets_mapping=True) if records else None
        results: list[tuple[Ids, Ids] | DataError] = []
        for index, (record, (text, spans)) in enumerate(zip(records, rendered, strict=True)):
            assert batch is not None
            fault = checked[index]
            if fault is None:
                ids, offsets = (
                    np.array(batch["input_ids"][index], np.int32),
                    np.array(batch["offset_mapping"][index]),
                )
                supervised = _supervised(text, offsets, spans)
                if supervised is not None:
                    results.append((ids, np.where(supervised, ids, IGNORE_INDEX).astype(np.int32)))
                    continue
                fault = DataError(f"record {record.id}: a token spans the border of an answer: use another template")
            results.append(fault)
        return results

    def prompt(self, turns: Sequence[Turn]) -> Ids:
        """Token ids that ask for the next answer, an image as one token. Raises `DataError` for forged tokens."""
        if fault := self._forged("the conversation", turns):
            raise fault
        return np.array(self.tokenizer(self.render(turns, prompt=True)[0])["input_ids"], np.int32)

    @property
    def _eos(self) -> str:
        eos: str | None = self.tokenizer.eos_token
        if eos is None:
            raise UsageError(
                f"template {self.template} needs an end-of-sequence token, which this llm's tokenizer lacks"
            )
        return eos

    def _forged(self, name: str, turns: Sequence[Turn]) -> DataError | None:
        """Text that would tokenise to control tokens could forge a turn or an image."""
        for turn in turns:
            for token in self.tokenizer.all_special_tokens:
                if token in turn.text and not (token == IMAGE_TOKEN and turn.role == "user"):
                    return DataError(f"{name}: the {turn.role}'s text contains the control token {token!r}")
        return None


def _supervised(text: str, offsets: NDArray[np.int64], spans: Sequence[Span]) -> NDArray[np.bool_] | None:
    """Which tokens lie in the spans; None if one lies across a border with more than white space."""
    inside = np.zeros(len(offsets), bool)
    starts, ends = offsets[:, 0], offsets[:, 1]
    for first, last in spans:
        touching = (starts < last) & (ends > first)
        for token in np.flatnonzero(touching & ((starts < first) | (ends > last))):
            outside = text[starts[token] : first] + text[last : ends[token]]
            if outside.strip():
                return None
        inside |= touching
    return inside
