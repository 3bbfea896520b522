"""Generate tokens from embedded prompts: one packed prefill pass, then one token per conversation and step.

`generate` of transformers can neither take packed prompts nor drop finished conversations, hence this loop. Only the
end tokens come from the model's generation config; `Decoding` alone determines how tokens are chosen.
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

from anyres_vlm.checkpoints.load_save import end_tokens
from anyres_vlm.errors import UsageError
from anyres_vlm.geometry import TilePlan
from anyres_vlm.model.attention import separated
from anyres_vlm.model.kv_cache import ConversationCache
from anyres_vlm.model.vlm import VisionLanguageModel

Watch = Callable[[Sequence[int], Tensor], None]
"""Called at each step with the chosen tokens, end tokens included, and their logits (B, V)."""


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen: greedily at temperature 0, otherwise by nucleus sampling with `top_p`.

    Samples depend on `seed` and the number of their conversation only, not on the rest of the batch.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or not 0 <= self.temperature < float("inf") or not 0 <= self.top_p <= 1:
            raise UsageError(f"{self}: expected max_new_tokens >= 1, a finite temperature >= 0 and top_p from 0 to 1")
        if self.seed < 0:
            raise UsageError(f"seed={self.seed}: expected 0 or more")


@torch.inference_mode()
def stream_tokens(
    model: VisionLanguageModel,
    input_ids: Tensor,
    lengths: Sequence[int],
    tiles: Tensor,
    plans: Sequence[TilePlan],
    decoding: Decoding,
    numbers: Sequence[int] | None = None,
    watch: Watch | None = None,
) -> Iterator[tuple[int, int]]:
    """Yield new tokens for packed prompts (1, L) of these lengths with all their images; see `generate_tokens`."""
    words = model.language_model.get_input_embeddings()
    embedded = model.embed(input_ids, tiles, plans) if plans else words(input_ids)
    yield from generate_tokens(model.language_model, embedded, lengths, decoding, numbers, watch)


def generate_tokens(
    language_model: PreTrainedModel,
    embedded: Tensor,
    lengths: Sequence[int],
    decoding: Decoding,
    numbers: Sequence[int] | None = None,
    watch: Watch | None = None,
) -> Iterator[tuple[int, int]]:
    """Yield (conversation, token) pairs for packed prompts (1, L, D), without end tokens.

    `numbers` are combined with the seed, one per conversation; by default they count from 0. Raises `UsageError` for a
    prompt that is too long.
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
        if 2 * len(places) <= len(rows):  # copies the cache, so not each time one ends
            cache.keep(places)
            rows, tokens = [rows[place] for place in places], [tokens[place] for place in places]
        positions = [lengths[row] + step if row in unfinished else 0 for row in rows]
        hidden = _read_tokens(language_model, tokens, positions, cache, embedded.device)


def room_for_answer(language_model: PreTrainedModel, length: int, wanted: int) -> int:
    """Return how many of the wanted new tokens fit after a prompt of this length. Raises `UsageError` if none do."""
    config: Any = language_model.config
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "sliding_window")]
    limit = min((limit for limit in limits if limit is not None), default=None)
    if limit is not None and length >= limit:
        raise UsageError(
            f"the prompt has {length:,} tokens, the context limit is {limit:,} tokens, answer included: "
            "use fewer images or words, or start a new conversation"
        )
    if length == 0:
        raise UsageError("the prompt has no tokens: ask a question")
    return wanted if limit is None else min(wanted, limit - length)


class _Choice:
    """Chooses the next token of each conversation, with a random generator per conversation."""

    def __init__(self, decoding: Decoding, numbers: Sequence[int], device: torch.device) -> None:
        self.warpers: Any = None
        if decoding.temperature > 0:
            self.warpers = LogitsProcessorList(
                [TemperatureLogitsWarper(float(decoding.temperature)), TopPLogitsWarper(decoding.top_p)]
            )
            seeds = [np.random.SeedSequence((decoding.seed, number)).generate_state(1)[0] for number in numbers]
            self.generators = [torch.Generator(device).manual_seed(int(seed)) for seed in seeds]

    def __call__(self, logits: Tensor, rows: Sequence[int]) -> list[int]:
        """Choose tokens. (B, V) -> B tokens."""
        if self.warpers is None:
            greedy: list[int] = logits.argmax(-1).tolist()
            return greedy
        # In double precision and with a maximum of 0: otherwise a temperature near 0 would give infinity.
        logits = logits.double()
        shares = self.warpers(None, logits - logits.amax(-1, keepdim=True)).softmax(-1)
        return [
            int(torch.multinomial(share, 1, generator=self.generators[row]))
            for row, share in zip(rows, shares, strict=True)
        ]


def _read_prompts(
    language_model: PreTrainedModel, embedded: Tensor, lengths: Sequence[int], cache: ConversationCache
) -> Tensor:
    """Run the packed prompts and return the last hidden state of each. (1, L, D) -> (B, D)."""
    device = embedded.device
    ends = torch.tensor(np.cumsum(lengths), device=device)
    with separated(language_model, torch.nn.functional.pad(ends, (1, 0)).to(torch.int32), lengths) as documents:
        hidden = _forward(
            language_model,
            cache,
            inputs_embeds=embedded,
            position_ids=torch.cat([torch.arange(length, device=device) for length in lengths])[None],
            documents=documents,
        )
    return hidden[0, ends - 1]


def _read_tokens(
    language_model: PreTrainedModel,
    tokens: Sequence[int],
    positions: Sequence[int],
    cache: ConversationCache,
    device: torch.device,
) -> Tensor:
    """Run one new token per conversation and return its hidden state, (B, D)."""
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
