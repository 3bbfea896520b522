"""Document-exact attention over packed sequences, registered with transformers as `anyres`.

Any causal language model of transformers that looks up its attention function by name then attends only within the
documents of a pack; no (L, L) mask is ever built. Without `documents`, this is plain causal attention over one unpadded
sequence or, in generation, attention of one new token per conversation. Keys are not repeated for grouped queries:
torch's fused kernels support them, on the CPU too.

`varlen_obstacle` decides whether a pack goes through one call of FlashAttention per layer or through SDPA, document by
document; `anyres doctor` reports what it returns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from anyres_vlm.errors import UsageError
from anyres_vlm.model.kv_cache import attend_cached

ATTENTION_NAME = "anyres"
UNSUPPORTED = {"softcap": "logit soft-capping", "s_aux": "sinks", "position_bias": "position biases"}
OLDEST_BF16 = (8, 0)  # compute capability of Ampere: the first with bf16 and FlashAttention
LARGEST_HEAD = 256  # dimensions of a head that FlashAttention supports, in multiples of 8

_separating: WeakSet[PreTrainedModel] = WeakSet()  # models that have passed the check of `separated`


@dataclass(frozen=True)
class Documents:
    """The documents of a pack, made once per forward pass and passed to every attention layer.

    The lengths are on the host, so that no layer has to wait for the device.
    """

    boundaries: Tensor  # (documents + 1,) int32, 0 and L included
    lengths: Sequence[int]
    used_by: list[nn.Module] | None = None  # layers that used the boundaries; recorded in a model's first pass only

    @cached_property
    def longest(self) -> int:
        """Length of the longest document."""
        return max(self.lengths)


@contextmanager
def separated(model: PreTrainedModel, boundaries: Tensor, lengths: Sequence[int]) -> Iterator[Documents]:
    """Yield the documents of a pack for one forward pass of the model within the block.

    After the model's first pass, raises `UsageError` unless every layer has used the boundaries: a model that drops the
    keyword on the way to its attention, or mixes positions by other means, would silently let documents attend to each
    other.
    """
    is_checked = model in _separating and model.config._attn_implementation == ATTENTION_NAME
    documents = Documents(boundaries, lengths, None if is_checked else [])
    yield documents
    if documents.used_by is None:
        return
    layers: int = model.config.num_hidden_layers
    if len(documents.used_by) < layers:
        raise UsageError(
            f"{type(model).__name__} separates documents in {len(documents.used_by)} of its {layers} layers, "
            "so packed samples would attend to each other: choose another language model"
        )
    _separating.add(model)


def has_bf16(device: torch.device) -> bool:
    """Return whether a GPU computes in bf16 and runs FlashAttention; older ones emulate the one and lack the other."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= OLDEST_BF16


def varlen_obstacle(device: torch.device, dtype: torch.dtype, head_dims: set[int], dropout: float) -> str | None:
    """Return why FlashAttention's varlen kernel cannot take packed documents; None if it can.

    `dtype` is that of the computation, `head_dims` are the dimensions of a head of queries and of values.
    """
    if device.type != "cuda":
        return f"the device is {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"the computation is in {dtype}".replace("torch.", "")
    if not has_bf16(device):
        return "the GPU's compute capability is below 8.0"
    if dropout > 0:
        return f"the model has attention dropout of {dropout:g}"
    if len(head_dims) > 1 or any(size % 8 or size > LARGEST_HEAD for size in head_dims):
        return f"heads have {' and '.join(map(str, sorted(head_dims)))} dimensions"
    return None


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of matrix products with a tensor: autocast's, or its own without autocast."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def disable_cudnn_attention() -> None:
    """Turn off cuDNN's SDPA in this process: it builds an execution plan for each new shape, and here shapes vary.

    New are the number of keys at every generated token, the length of every document and the number of tiles.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


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

    Under autocast all three are cast to its dtype, as rotary embeddings return queries and keys in fp32. Raises
    `UsageError` for what it cannot compute exactly: soft-capping, sinks, position biases, or a sliding window that is
    shorter than a document.
    """
    for name, kind in UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise UsageError(f"attention with {kind} is not supported: choose another language model")
    dtype = compute_dtype(value)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    one_token = documents is None and query.shape[2] == 1
    assert attention_mask is None or one_token, "transformers builds no mask, as none is registered"
    longest = key.shape[2] if documents is None else documents.longest
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
    if documents.used_by is not None:
        documents.used_by.append(module)
    if varlen_obstacle(query.device, dtype, {query.shape[-1], value.shape[-1]}, dropout) is None:
        return _varlen(query, key, value, scaling, documents.boundaries.to(query.device), longest), None
    parts = zip(*(torch.split(x, list(documents.lengths), dim=2) for x in (query, key, value)), strict=True)
    return torch.cat([_attend(q, k, v, scaling, dropout) for q, k, v in parts], dim=1), None


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, dropout: float) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


def _varlen(q: Tensor, k: Tensor, v: Tensor, scale: float | None, cu_seqlens: Tensor, longest: int) -> Tensor:
    """Run torch's own FlashAttention kernel over all documents at once; with a window it never takes cuDNN's."""
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
