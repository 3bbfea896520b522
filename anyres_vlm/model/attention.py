"""Document-exact attention over packed sequences, registered with transformers as `anyres`.

Any causal language model of transformers that looks up its attention function by name then attends only within the
documents of a pack; no (L, L) mask is ever built. Without `documents`, this is plain causal attention over one unpadded
sequence or, in generation, attention of one new token per conversation. Keys are not repeated for grouped queries:
torch's fused kernels support them, on the CPU too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from anyres_vlm.errors import UsageError
from anyres_vlm.model.kv_cache import attend_cached

ATTENTION_NAME = "anyres"
UNSUPPORTED = {"softcap": "logit soft-capping", "s_aux": "sinks", "position_bias": "position biases"}


@dataclass
class Documents:
    """Boundaries of the documents in a pack, and the number of attention layers that have used them.

    The lengths are copied from the device once per pack, not once per layer. The layers are counted because a model
    that drops the keyword on the way to its attention, or mixes positions by other means, would silently let documents
    attend to each other.
    """

    boundaries: Tensor  # (documents + 1,) int32, 0 and L included
    lengths: list[int]
    layers_seen: int = 0

    @classmethod
    def between(cls, boundaries: Tensor) -> Documents:
        """Return the documents between these boundaries."""
        return cls(boundaries, boundaries.diff().tolist())

    def check(self, model: PreTrainedModel) -> None:
        """Raise `UsageError` unless every layer of the model has used the document boundaries."""
        layers: int = model.config.num_hidden_layers
        if self.layers_seen < layers:
            raise UsageError(
                f"{type(model).__name__} separates documents in {self.layers_seen} of its {layers} layers, "
                "so packed samples would attend to each other: choose another language model"
            )


def sliding_window(config: PreTrainedConfig) -> int | None:
    """How many of the last tokens any layer of a language model is limited to; None where no layer is."""
    settings = config.to_dict()
    kinds = settings.get("layer_types")
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    window: int | None = settings.get("sliding_window")
    return window


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    documents: Documents | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention within each document. (1, H, L, d) and keys/values (1, Hkv, L, d) -> (1, L, H, d).

    Raises `UsageError` for what it cannot compute exactly: soft-capping, sinks, position biases, or a sliding window
    that is shorter than a document.
    """
    for name, kind in UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise UsageError(f"attention with {kind} is not supported: choose another language model")
    one_token = documents is None and query.shape[2] == 1
    assert attention_mask is None or one_token, "transformers builds no mask, as none is registered"
    longest = key.shape[2] if documents is None else max(documents.lengths)
    window = kwargs.get("sliding_window")
    if window is not None and window < longest:
        raise UsageError(
            f"a document of {longest} tokens exceeds the model's sliding window of {window}: "
            f"lower max_length to {window}"
        )
    if one_token:
        return attend_cached(query, key, value, attention_mask, scaling).transpose(1, 2).contiguous(), None
    if documents is None:
        assert query.shape[2] == key.shape[2], "a prompt is processed at once, new tokens one by one"
        return _attend(query, key, value, scaling, dropout).contiguous(), None
    documents.layers_seen += 1
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and dropout == 0.0:
        return _varlen(query, key, value, scaling, documents.boundaries.to(query.device), longest), None
    parts = zip(*(torch.split(x, documents.lengths, dim=2) for x in (query, key, value)), strict=True)
    return torch.cat([_attend(q, k, v, scaling, dropout) for q, k, v in parts], dim=1), None


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, dropout: float) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


def _varlen(q: Tensor, k: Tensor, v: Tensor, scale: float | None, cu_seqlens: Tensor, longest: int) -> Tensor:
    """Run torch's own FlashAttention kernel over all documents at once."""
    from torch.nn.attention.varlen import varlen_attn  # needs a CUDA build of torch >= 2.10

    flat_q, flat_k, flat_v = (x[0].transpose(0, 1) for x in (q, k, v))
    out = varlen_attn(
        flat_q,
        flat_k,
        flat_v,
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        scale=scale,
        window_size=(-1, 0),
        enable_gqa=flat_q.shape[1] != flat_k.shape[1],
    )
    assert isinstance(out, Tensor)
    return out[None]


AttentionInterface.register(ATTENTION_NAME, packed_attention)
