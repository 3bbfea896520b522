"""A preallocated key-value cache for several conversations, and the attention of new tokens over it.

The cache of transformers concatenates all keys and values of every layer at each new token: after the prompt of a 2x2
image, that moves more bytes than the rest of the step.
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

ROOM = 256  # most columns added at a time; each addition copies the cache


class ConversationLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer, (B, Hkv, columns, d), padded on the left: all conversations end in the same column.

    The first update takes the packed prompts, (1, Hkv, L, d); later ones take a token per conversation, (B, Hkv, 1, d).
    """

    is_sliding = False

    def __init__(self, lengths: Sequence[int], room: int) -> None:
        super().__init__()
        self.lengths, self.room = lengths, room
        self.begin = 0  # columns before it are used by finished conversations only
        self.end = max(lengths)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Lay out the packed prompts in rows; the left padding is masked, but must be finite."""
        self.keys, self.values = (self._rows(packed) for packed in (key_states, value_states))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *arguments: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the prompts' keys and values as given, or those of all columns with the new tokens added."""
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
        """Keep only these conversations."""
        self.keys, self.values = (kept[:, :, self.begin :][list(rows)] for kept in (self.keys, self.values))
        self.begin, self.end = 0, self.end - self.begin

    def get_seq_length(self) -> int:
        """Return the number of columns in use."""
        return self.end - self.begin if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of columns after the next update, and the first column."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return -1, by which transformers means no maximum."""
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
    """The cache for a batch of prompts of these lengths, for any model that uses `attend_cached`."""

    layers: list[ConversationLayer]

    def __init__(self, lengths: Sequence[int], new_tokens: int) -> None:
        super().__init__(layer_class_to_replicate=partial(ConversationLayer, lengths, min(new_tokens, ROOM)))
        self.starts = [max(lengths) - length for length in lengths]

    def skip_columns(self, unfinished: Sequence[int]) -> None:
        """Skip the columns that no unfinished conversation uses."""
        first = min(self.starts[row] for row in unfinished)
        for layer in self.layers:
            layer.begin = first

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other conversations and the columns that only they used."""
        begin = self.layers[0].begin
        self.starts = [max(self.starts[row] - begin, 0) for row in rows]
        for layer in self.layers:
            layer.keep(rows)

    def mask(self, device: torch.device) -> Tensor | None:
        """Return the columns of each conversation, next token included: (B, 1, 1, columns), or None if all are used."""
        begin, end = self.layers[0].begin, self.layers[0].end
        if max(self.starts) <= begin:
            return None
        starts = torch.tensor(self.starts, device=device)
        return (torch.arange(begin, end + 1, device=device) >= starts[:, None])[:, None, None]


def attend_cached(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """Compute attention of one new token per conversation. (B, H, 1, d), keys/values (B, Hkv, L, d) -> (B, H, 1, d).

    Heads that share keys become queries of one product: torch's `enable_gqa` takes twice the time on a CPU.
    """
    grouped = rearrange(query, "b (k g) 1 d -> b k g d", k=key.shape[1])
    out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return rearrange(out, "b k g d -> b (k g) 1 d")
