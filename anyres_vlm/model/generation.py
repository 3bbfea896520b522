"""From embedded prompts to new tokens: one packed pass over all prompts, then a token of each conversation at a time.

A loop of our own, for `generate` of transformers can neither read packed prompts nor let finished conversations go. Of
the model's generation config it takes the end tokens; how a token is chosen is said by `Decoding` alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from anyres_vlm.errors import UsageError
from anyres_vlm.model.attention import Documents
from anyres_vlm.model.generation_config import end_tokens
from anyres_vlm.model.kv_cache import ConversationCache

Watch = Callable[[Sequence[int], Tensor], None]
"""Gets each step's tokens, end tokens too, and the logits that they were chosen of, (B, V)."""


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen: greedy at temperature 0, else sampled from the nucleus `top_p`.

    A sample is decided by `seed` and the number of its conversation, whatever else is in the batch.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or not 0 <= self.temperature < float("inf") or not 0 <= self.top_p <= 1:
            raise UsageError(f"{self}: expected max_new_tokens from 1, temperature from 0 and top_p between 0 and 1")
        if self.seed < 0:
            raise UsageError(f"seed={self.seed}: expected 0 or more")


def room_for_answer(language_model: PreTrainedModel, length: int, wanted: int) -> int:
    """As many of the wanted new tokens as fit behind a prompt of this length. Raises `UsageError` where none does."""
    config: Any = language_model.config
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "sliding_window")]
    limit = min((limit for limit in limits if limit is not None), default=None)
    if limit is not None and length >= limit:
        raise UsageError(
            f"the prompt has {length:,} tokens, the model reads {limit:,} with the answer: "
            "ask with fewer images or words, or begin a new conversation"
        )
    if length == 0:
        raise UsageError("the prompt has no token: ask something")
    return wanted if limit is None else min(wanted, limit - length)


def generate_tokens(
    language_model: PreTrainedModel,
    embedded: Tensor,
    lengths: Sequence[int],
    decoding: Decoding,
    numbers: Sequence[int] | None = None,
    watch: Watch | None = None,
) -> Iterator[tuple[int, int]]:
    """New tokens of packed prompts, (1, L, D), as pairs of the conversation's place and the token, without end tokens.

    `numbers` are what the seed is combined with, the places unless given. Raises `UsageError` for a prompt too long.
    """
    rooms = [room_for_answer(language_model, length, decoding.max_new_tokens) for length in lengths]
    choice = _Choice(decoding, range(len(lengths)) if numbers is None else numbers, embedded.device)
    stops = end_tokens(language_model.generation_config)
    cache = ConversationCache(lengths, max(rooms))
    rows = list(range(len(lengths)))  # the conversations in the cache
    unfinished = set(rows)
    hidden = _read_prompts(language_model, embedded, lengths, cache)
    for step in range(max(rooms)):
        logits = language_model.get_output_embeddings()(hidden).float()
        tokens = choice(logits, rows)
        if watch is not None:
            watch(tokens, logits)
        for row, token in zip(rows, tokens, strict=True):
            if row in unfinished and token not in stops:
                yield row, token
            if token in stops or step + 1 == rooms[row]:
                unfinished.discard(row)
        if not unfinished:
            return
        places = [place for place, row in enumerate(rows) if row in unfinished]
        cache.skip_columns(places)
        if 2 * len(places) <= len(rows):  # a copy of the cache, so not for each one that ends
            cache.keep(places)
            rows, tokens = [rows[place] for place in places], [tokens[place] for place in places]
        positions = [lengths[row] + step if row in unfinished else 0 for row in rows]
        hidden = _read_tokens(language_model, tokens, positions, cache, embedded.device)


class _Choice:
    """The next token of each conversation, whose random numbers are its own."""

    def __init__(self, decoding: Decoding, numbers: Sequence[int], device: torch.device) -> None:
        self.warpers: Any = None
        if decoding.temperature > 0:
            self.warpers = LogitsProcessorList(
                [TemperatureLogitsWarper(float(decoding.temperature)), TopPLogitsWarper(decoding.top_p)]
            )
            seeds = [np.random.SeedSequence((decoding.seed, number)).generate_state(1)[0] for number in numbers]
            self.generators = [torch.Generator(device).manual_seed(int(seed)) for seed in seeds]

    def __call__(self, logits: Tensor, rows: Sequence[int]) -> list[int]:
        """(B, V) -> B tokens."""
        if self.warpers is None:
            greedy: list[int] = logits.argmax(-1).tolist()
            return greedy
        # In double and from 0 down, or a temperature near 0 would divide to infinity.
        logits = logits.double()
        shares = self.warpers(None, logits - logits.amax(-1, keepdim=True)).softmax(-1)
        return [
            int(torch.multinomial(share, 1, generator=self.generators[row]))
            for row, share in zip(rows, shares, strict=True)
        ]


def _read_prompts(
    language_model: PreTrainedModel, embedded: Tensor, lengths: Sequence[int], cache: ConversationCache
) -> Tensor:
    """The last hidden state of each prompt, (1, L, D) -> (B, D)."""
    device = embedded.device
    ends = torch.tensor(np.cumsum(lengths), device=device)
    documents = Documents(torch.nn.functional.pad(ends, (1, 0)).to(torch.int32), list(lengths))
    hidden = _forward(
        language_model,
        cache,
        inputs_embeds=embedded,
        position_ids=torch.cat([torch.arange(length, device=device) for length in lengths])[None],
        documents=documents,
    )
    documents.check(language_model)
    return hidden[0, ends - 1]


def _read_tokens(
    language_model: PreTrainedModel,
    tokens: Sequence[int],
    positions: Sequence[int],
    cache: ConversationCache,
    device: torch.device,
) -> Tensor:
    """The hidden state behind one new token of each conversation, (B, D)."""
    hidden = _forward(
        language_model,
        cache,
        input_ids=torch.tensor(tokens, device=device)[:, None],
        position_ids=torch.tensor(positions, device=device)[:, None],
        attention_mask=cache.mask(device),
    )
    return hidden[:, 0]


def _forward(language_model: PreTrainedModel, cache: ConversationCache, **inputs: Any) -> Tensor:
    base: Any = language_model.base_model
    name = "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"  # before 5.24
    hidden: Tensor = base(**inputs, **{name: cache}, use_cache=True).last_hidden_state
    return hidden
