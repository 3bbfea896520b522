"""What a pack costs the ranks that run it, in tokens: sum(length) + square * sum(length**2) + tile * tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyres_vlm.errors import UsageError

LARGEST_SQUARE, LARGEST_TILE = 1e-3, 1e6  # far beyond any model; keeps the fixed-point arithmetic within 64 bits


@dataclass(frozen=True)
class CostModel:
    """Cost of a squared token (causal attention) and of a tile (vision encoder), in tokens of the language model.

    The defaults are those of a 7B model with CLIP ViT-L/14-336. Raises `UsageError` outside 0 <= square <= 0.001,
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
        """In 2**-30 tokens."""
        return round(self.square * 2**30)

    @property
    def fixed_tile(self) -> int:
        """In 1/1024 token."""
        return round(self.tile * 1024)


def derive_cost(language: Any, vision: Any, layers: int | Sequence[int] = -2) -> CostModel:
    """By forward FLOPs, from transformers' configurations of a Llama-like language model and a CLIP vision encoder.

    A token costs 2 FLOPs a parameter; a pair of tokens in a causal layer 4 * heads * head_dim / 2, as half the pairs
    are masked; a tile the encoder's layers up to the deepest of `layers` and the projector over them all. Raises
    `UsageError` for other kinds.
    """
    try:
        token = 2 * _language_parameters(language)
        head = getattr(language, "head_dim", None) or language.hidden_size // language.num_attention_heads
        pair = 2 * language.num_hidden_layers * language.num_attention_heads * head
        features = (layers,) if isinstance(layers, int) else layers
        tile = _tile_flops(vision, features) + _projector_flops(vision, len(features), language.hidden_size)
    except AttributeError as error:
        raise UsageError(f"cannot derive costs from this model: {error}; give --cost-sq and --cost-tile") from None
    return CostModel(square=pair / token, tile=tile / token)


def read_cost(path: Path) -> CostModel:
    """Derive the costs from a Hugging Face folder or `config.json` of a LLaVA-like model, or from a run's YAML.

    A YAML names its language model and its encoder as folders or hub ids; both must be at hand. Raises `UsageError`.
    """
    from transformers import AutoConfig  # start-up time

    from anyres_vlm.config import CheckpointConfig, load_config

    def read(name: str | Path) -> Any:
        try:
            return AutoConfig.from_pretrained(name, local_files_only=True)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UsageError(
                f"{path}: no model configuration {name} at hand ({reason}); give a folder with a config.json, or "
                "--cost-sq and --cost-tile"
            ) from None

    if path.suffix in (".yaml", ".yml"):
        model = load_config(path).model
        if isinstance(model, CheckpointConfig):
            return read_cost(Path(model.checkpoint))
        vision = read(model.encoder.name)
        return derive_cost(read(model.llm), getattr(vision, "vision_config", vision), model.encoder.layer)
    if not path.exists():
        raise UsageError(f"{path}: no such file; expected a folder with a config.json, or a YAML configuration")
    whole = read(path.parent if path.name == "config.json" else path)
    if not hasattr(whole, "text_config") or not hasattr(whole, "vision_config"):
        raise UsageError(f"{path}: a {whole.model_type} has no text_config and vision_config: expected a LLaVA model")
    return derive_cost(whole.text_config, whole.vision_config, getattr(whole, "vision_feature_layer", -2))


def _language_parameters(model: Any) -> int:
    head = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    queries = model.num_attention_heads * head
    keys = getattr(model, "num_key_value_heads", model.num_attention_heads) * head
    layer = 2 * model.hidden_size * (queries + keys) + 3 * model.hidden_size * model.intermediate_size
    embeddings = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    return int(embeddings + model.num_hidden_layers * layer)


def _tile_flops(vision: Any, features: Sequence[int]) -> int:
    width, patches = vision.hidden_size, (vision.image_size // vision.patch_size) ** 2
    positions = patches + 1  # CLS
    layers = max(vision.num_hidden_layers + 1 + layer if layer < 0 else layer for layer in features)
    weights = 4 * width**2 + 2 * width * vision.intermediate_size
    return int(
        layers * (2 * weights * positions + 4 * width * positions**2) + 6 * patches * width * vision.patch_size**2
    )


def _projector_flops(vision: Any, features: int, width: int) -> int:
    patches = (vision.image_size // vision.patch_size) ** 2
    return int(2 * patches * (features * vision.hidden_size + width) * width)
