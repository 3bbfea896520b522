"""Document-exact attention over packed sequences, registered with transformers as `anyres`.

Any causal language model of transformers that looks its attention up by name then attends only inside the documents
that `cu_seqlens` delimits; no (L, L) mask is ever built. Without `cu_seqlens` it is plain causal attention over one
unpadded sequence, or in generation that of one new token a conversation.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from anyres_vlm.errors import UsageError
from anyres_vlm.model.kv_cache import attend_cached

ATTENTION_NAME = "anyres"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seqlens: Tensor | None = None,
    longest: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each document. (1, H, L, d) and keys/values (1, Hkv, L, d) -> (1, L, H, d).

    Raises `UsageError` for what it cannot do exactly: logit soft-capping, and a sliding window shorter than a document.
    """
    if kwargs.get("softcap") is not None:
        raise UsageError("attention with logit soft-capping is not supported: choose another language model")
    one_token = cu_seqlens is None and query.shape[2] == 1
    assert attention_mask is None or one_token, "transformers builds no mask for an attention without mask function"
    longest = key.shape[2] if cu_seqlens is None else longest
    assert longest is not None, "the longest document comes with cu_seqlens: reading it here would stall every layer"
    window = kwargs.get("sliding_window")
    if window is not None and window < longest:
        raise UsageError(
            f"a document of {longest} tokens exceeds the model's sliding window of {window}: "
            f"lower max_length to {window}"
        )
    if one_token:
        out = attend_cached(query, key, value, attention_mask, scaling)
    elif cu_seqlens is None:
        assert query.shape[2] == key.shape[2], "a prompt is fed at once, then token by token"
        out = _attend(query, key, value, scaling, dropout, True)
    elif query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and dropout == 0.0:
        out = _varlen(query, key, value, scaling, cu_seqlens, longest)
    else:
        sizes = cu_seqlens.diff().tolist()
        parts = zip(*(torch.split(x, sizes, dim=2) for x in (query, key, value)), strict=True)
        out = torch.cat([_attend(q, k, v, scaling, dropout, True) for q, k, v in parts], dim=2)
    return out.transpose(1, 2).contiguous(), None


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, dropout: float, is_causal: bool) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, dropout_p=dropout, is_causal=is_causal, scale=scale, enable_gqa=grouped
    )


def _varlen(q: Tensor, k: Tensor, v: Tensor, scale: float | None, cu_seqlens: Tensor, longest: int) -> Tensor:
    """FlashAttention over all documents at once, through torch's own kernel."""
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
    return out.transpose(0, 1)[None]


AttentionInterface.register(ATTENTION_NAME, packed_attention)
