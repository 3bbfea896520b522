"""Keys and values of several conversations at once, with room to grow, and one new token's attention to them.

Transformers' own cache concatenates all keys and values of every layer at each token: behind the prompt of a 2x2 image
that moves more bytes than the token needs otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

ROOM = 256  # columns that are added at a time at most, each time at the price of a copy


class ConversationLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer, (B, Hkv, columns, d). All conversations end in the same column, so shorter ones begin in a later one.

    The first update takes the packed prompts, (1, Hkv, L, d); later ones a token of each conversation, (B, Hkv, 1, d).
    """

    is_sliding = False

    def __init__(self, lengths: Sequence[int], room: int) -> None:
        super().__init__()
        self.lengths, self.room = lengths, room
        self.begin = 0  # the columns before it belong to finished conversations alone
        self.end = max(lengths)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Lay the packed prompts out in rows; what stands before a shorter one is masked, but must be finite."""
        self.keys, self.values = (self._rows(packed) for packed in (key_states, value_states))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *arguments: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """The prompts' keys and values as they came, or those of all columns with the new token's."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            return key_states, value_states
        if self.end == self.keys.shape[2]:
            self.keys, self.values = (F.pad(kept, (0, 0, 0, self.room)) for kept in (self.keys, self.values))
        self.keys[:, :, self.end] = key_states[:, :, 0]
        self.values[:, :, self.end] = value_states[:, :, 0]
        self.end += 1
        columns = slice(self.begin, self.end)
        return self.keys[:, :, columns], self.values[:, :, columns]

    def keep(self, rows: Sequence[int]) -> None:
        """Only these conversations go on."""
        self.keys, self.values = (kept[:, :, self.begin :][list(rows)] for kept in (self.keys, self.values))
        self.begin, self.end = 0, self.end - self.begin

    def get_seq_length(self) -> int:
        """Columns in use."""
        return self.end - self.begin if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns behind the next update, and the first one."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """None, which transformers writes as -1."""
        return -1

    def _rows(self, packed: Tensor) -> Tensor:
        _, heads, _, width = packed.shape
        rows = packed.new_empty((len(self.lengths), heads, self.end + self.room, width))
        for row, prompt in zip(rows, torch.split(packed[0], list(self.lengths), dim=1), strict=True):
            first = self.end - prompt.shape[1]
            row[:, :first] = 0
            row[:, first : self.end] = prompt
        return rows


class ConversationCache(Cache):  # type: ignore[misc]
    """The cache of a batch of prompts of these lengths, for any model that attends by `attend_cached`."""

    layers: list[ConversationLayer]

    def __init__(self, lengths: Sequence[int], new_tokens: int) -> None:
        super().__init__(layer_class_to_replicate=partial(ConversationLayer, lengths, min(new_tokens, ROOM)))
        self.starts = [max(lengths) - length for length in lengths]

    def skip_columns(self, unfinished: Sequence[int]) -> None:
        """Leave out the columns that no unfinished conversation has."""
        first = min(self.starts[row] for row in unfinished)
        for layer in self.layers:
            layer.begin = first

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other conversations and the columns that only they had."""
        begin = self.layers[0].begin
        self.starts = [max(self.starts[row] - begin, 0) for row in rows]
        for layer in self.layers:
            layer.keep(rows)

    def mask(self, device: torch.device) -> Tensor | None:
        """Which columns each conversation has, the coming token's included: (B, 1, 1, columns), or None for all."""
        begin, end = self.layers[0].begin, self.layers[0].end
        if max(self.starts) <= begin:
            return None
        starts = torch.tensor(self.starts, device=device)
        return (torch.arange(begin, end + 1, device=device) >= starts[:, None])[:, None, None]


def attend_cached(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """Attention of one new token a conversation. (B, H, 1, d) and keys/values (B, Hkv, L, d) -> (B, H, 1, d).

    Heads that share keys become the queries of one product: torch's `enable_gqa` takes twice the time on a CPU.
    """
    grouped = rearrange(query, "b (k g) 1 d -> b k g d", k=key.shape[1])
    out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return rearrange(out, "b k g d -> b (k g) 1 d")
