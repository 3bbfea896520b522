"""FLOPs of a LLaVA-like model per unit of work, computed from transformers configurations."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from anyres_vlm.errors import UsageError


@dataclass(frozen=True)
class Flops:
    """FLOPs of a forward pass. Only matrix products count, a multiplication with its addition as two."""

    token: float  # per token, layers of the language model without attention products
    head: float  # per position with logits
    pair: float  # per pair of a query and a visible key, over all layers
    encoder: float  # per tile, up to the deepest chosen layer
    projector: float  # per tile


def forward_flops(language: Any, vision: Any, layers: int | Sequence[int] = -2) -> Flops:
    """Count the FLOPs of a Llama-like language model and a CLIP vision encoder whose `layers` are projected.

    Raises `UsageError` for other architectures.
    """
    features = (layers,) if isinstance(layers, int) else layers
    try:
        heads = language.num_attention_heads
        head_dim = getattr(language, "head_dim", None) or language.hidden_size // heads
        return Flops(
            token=2 * language.num_hidden_layers * _layer_parameters(language, head_dim),
            head=2 * language.vocab_size * language.hidden_size,
            pair=4 * language.num_hidden_layers * heads * head_dim,
            encoder=_encoder(vision, features),
            projector=_projector(vision, len(features), language.hidden_size),
        )
    except AttributeError as error:
        raise UsageError(f"cannot count the FLOPs of this model: {error}") from None


def training_flops(
    flops: Flops, trained: Collection[str], *, tokens: int, supervised_tokens: int, pairs: int, tiles: int
) -> float:
    """Count the FLOPs of a forward and backward pass, without recomputation by activation checkpointing.

    Per matrix product of the forward pass, the backward pass has one for a frozen matrix, which still passes gradients
    on, and two for a trained one. In attention products both operands need gradients. Logits are computed for
    supervised tokens only. `trained` are the names of trained parts of the model.
    """
    language = 3 if "language_model" in trained else 2
    encoder = 3 if "vision_tower" in trained else 1
    return (
        language * (flops.token * tokens + flops.head * supervised_tokens)
        + 3 * flops.pair * pairs
        + (encoder * flops.encoder + 3 * flops.projector) * tiles
    )


def _layer_parameters(model: Any, head_dim: int) -> int:
    queries = model.num_attention_heads * head_dim
    keys = getattr(model, "num_key_value_heads", model.num_attention_heads) * head_dim
    return int(2 * model.hidden_size * (queries + keys) + 3 * model.hidden_size * model.intermediate_size)


def _encoder(vision: Any, features: Sequence[int]) -> int:
    width, patches = vision.hidden_size, (vision.image_size // vision.patch_size) ** 2
    positions = patches + 1  # CLS
    layers = max(vision.num_hidden_layers + 1 + layer if layer < 0 else layer for layer in features)
    weights = 4 * width**2 + 2 * width * vision.intermediate_size
    embedding = 6 * patches * width * vision.patch_size**2
    return int(layers * (2 * weights * positions + 4 * width * positions**2) + embedding)


def _projector(vision: Any, features: int, width: int) -> int:
    patches = (vision.image_size // vision.patch_size) ** 2
    return int(2 * patches * (features * vision.hidden_size + width) * width)
