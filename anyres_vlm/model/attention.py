"""Document-exact attention over packed sequences, registered with transformers as `anyres`.

Any causal language model of transformers that looks its attention up by name then attends only inside the documents
that `cu_seqlens` delimits; no (L, L) mask is ever built. Without `cu_seqlens` (generation) it is plain causal attention
over one unpadded sequence. Grouped queries need no repeated keys: torch's fused kernels, on the CPU too, take them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from anyres_vlm.errors import UsageError

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
    lengths: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each document. (1, H, L, d) and keys/values (1, Hkv, L, d) -> (1, L, H, d).

    `lengths` are the documents' tokens: with them once a pack, no layer waits for the device to say `cu_seqlens`.
    Raises `UsageError` for what it cannot do exactly: logit soft-capping, and a sliding window shorter than a document.
    """
    if kwargs.get("softcap") is not None:
        raise UsageError("attention with logit soft-capping is not supported: choose another language model")
    assert attention_mask is None, "transformers builds no mask for an attention it has no mask function for"
    assert (cu_seqlens is None) == (lengths is None), "the documents' lengths come with their boundaries"
    longest = key.shape[2] if lengths is None else max(lengths)
    window = kwargs.get("sliding_window")
    if window is not None and window < longest:
        raise UsageError(
            f"a document of {longest} tokens exceeds the model's sliding window of {window}: "
            f"lower max_length to {window}"
        )
    if cu_seqlens is None or lengths is None:
        is_causal = query.shape[2] > 1
        assert not is_causal or query.shape[2] == key.shape[2], "a prompt is fed at once, then token by token"
        return _attend(query, key, value, scaling, dropout, is_causal).contiguous(), None
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and dropout == 0.0:
        return _varlen(query, key, value, scaling, cu_seqlens, longest), None
    parts = zip(*(torch.split(x, list(lengths), dim=2) for x in (query, key, value)), strict=True)
    return torch.cat([_attend(q, k, v, scaling, dropout, True) for q, k, v in parts], dim=1), None


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, dropout: float, is_causal: bool) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(
        q, k, v, dropout_p=dropout, is_causal=is_causal, scale=scale, enable_gqa=grouped
    )
    return out.transpose(1, 2)


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
    return out[None]


AttentionInterface.register(ATTENTION_NAME, packed_attention)
