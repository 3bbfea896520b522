"""The cost model of packing, and the FLOPs of a LLaVA-like model from which it is derived.

`CostModel` weighs squared tokens and tiles against tokens. `forward_flops` counts FLOPs from transformers
configurations, without building a model.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyres_vlm.errors import UsageError

LARGEST_SQUARE, LARGEST_TILE = 1e-3, 1e6  # far above any real model; keeps fixed-point arithmetic within 64 bits


@dataclass(frozen=True)
class CostModel:
    """Cost of a squared token (causal attention) and of a tile (vision encoder), in tokens of the language model.

    The defaults are for a 7B model with CLIP ViT-L/14-336. Raises `UsageError` outside 0 <= square <= 0.001,
    0 <= tile <= 1,000,000.
    """

    square: float = 2.0e-5
    tile: float = 29.0

    def __post_init__(self) -> None:
        if not 0 <= self.square <= LARGEST_SQUARE:
            raise UsageError(f"cost of a squared token {self.square}: expected 0 to {LARGEST_SQUARE} tokens")
        if not 0 <= self.tile <= LARGEST_TILE:
            raise UsageError(f"cost of a tile {self.tile}: expected 0 to {LARGEST_TILE:.0f} tokens")

    @property
    def fixed_square(self) -> int:
        """Cost of a squared token in units of 2**-30 tokens."""
        return round(self.square * 2**30)

    @property
    def fixed_tile(self) -> int:
        """Cost of a tile in units of 1/1024 token."""
        return round(self.tile * 1024)


def read_cost(path: Path) -> CostModel:
    """Derive the costs from the local folder or `config.json` of a LLaVA-like model. Raises `UsageError`."""
    from transformers import AutoConfig  # start-up time

    if not path.exists():
        raise UsageError(f"{path}: no such file; expected a folder with a config.json, or a YAML configuration")
    folder = path.parent if path.name == "config.json" else path
    try:
        whole: Any = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{path}: no model configuration ({reason}); give a folder with a config.json") from None
    if not hasattr(whole, "text_config") or not hasattr(whole, "vision_config"):
        raise UsageError(
            f"{path}: a {whole.model_type} model without text_config and vision_config: expected a LLaVA model"
        )
    layers = getattr(whole, "vision_feature_layer", -2)
    return derive_cost(forward_flops(whole.text_config, whole.vision_config, layers))


def derive_cost(flops: Flops) -> CostModel:
    """Derive the costs from FLOPs, with logits at every position and half of all pairs in causal attention.

    The costs of toy models are clipped to the largest allowed.
    """
    token = flops.token + flops.head
    square, tile = flops.pair / 2 / token, (flops.encoder + flops.projector) / token
    return CostModel(min(square, LARGEST_SQUARE), min(tile, LARGEST_TILE))


@dataclass(frozen=True)
class Flops:
    """FLOPs of a forward pass. Only matrix products count, a multiply-add as two."""

    token: float  # per token, in the layers of the language model without attention products
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
