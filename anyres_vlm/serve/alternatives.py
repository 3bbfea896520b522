"""What else the model might have said: the likeliest tokens of every step of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedTokenizerFast

Likely = tuple[str, float]  # a token's text and its probability


@dataclass
class Alternatives:
    """Watches one answer being generated; its probabilities are those before temperature and nucleus."""

    tokenizer: PreTrainedTokenizerFast
    count: int = 5
    steps: list[tuple[Likely, list[Likely]]] = field(default_factory=list)  # what was said, the likeliest

    def __call__(self, tokens: Sequence[int], logits: Tensor) -> None:
        """Take in a step: the one conversation's token and the logits that it was chosen of, (1, V)."""
        shares = logits[0].softmax(-1)
        top = shares.topk(min(self.count, len(shares)))
        likeliest = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        said = self._text(tokens[0]), float(shares[tokens[0]])
        self.steps.append((said, [(self._text(token), share) for token, share in likeliest]))

    def _text(self, token: int) -> str:
        text = str(self.tokenizer.decode([token]))
        # a part of a character, or nothing at all: the tokenizer's own name for it
        return text if text and "\ufffd" not in text else str(self.tokenizer.convert_ids_to_tokens(token))
