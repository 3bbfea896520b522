"""Floating-point operations of a LLaVA-like model, by unit of work, from transformers' configurations alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from anyres_vlm.errors import UsageError


@dataclass(frozen=True)
class Flops:
    """FLOPs of a forward pass; a multiplication and its addition count two, what is not a matrix product none."""

    token: float  # a token through the language model's layers, attention apart
    head: float  # a position whose logits are taken
    pair: float  # a query and a key that it sees, over all layers
    encoder: float  # a tile up to the deepest chosen layer
    projector: float  # a tile's features


def forward_flops(language: Any, vision: Any, layers: int | Sequence[int] = -2) -> Flops:
    """Of a Llama-like language model and a CLIP vision encoder whose `layers` are projected.

    Raises `UsageError` for other kinds.
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
    """Forward, and backward as far as gradients go; what checkpointing computes again is not counted.

    A frozen matrix still passes gradients on, which is one product for each of its forward pass; a trained one takes
    two. Both sides of attention's products get gradients. Logits are taken for supervised tokens alone. `trained` are
    parts of the model.
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
