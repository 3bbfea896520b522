"""Compute cost of a pack, in tokens: sum(length) + square * sum(length**2) + tile * tiles."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyres_vlm.errors import UsageError
from anyres_vlm.flops import Flops, forward_flops

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


def derive_cost(flops: Flops) -> CostModel:
    """Derive the costs from FLOPs, with logits at every position and half of all pairs in causal attention.

    The costs of toy models are clipped to the largest allowed.
    """
    token = flops.token + flops.head
    square, tile = flops.pair / 2 / token, (flops.encoder + flops.projector) / token
    return CostModel(min(square, LARGEST_SQUARE), min(tile, LARGEST_TILE))


def read_cost(path: Path) -> CostModel:
    """Derive the costs from a Hugging Face folder or `config.json` of a LLaVA-like model, or from a run's YAML file.

    A YAML file names its language model and encoder as folders or hub ids; both must be available locally. Raises
    `UsageError`.
    """
    from transformers import AutoConfig  # start-up time

    from anyres_vlm.config import CheckpointConfig, load_config

    def read(name: str | Path) -> Any:
        try:
            return AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UsageError(
                f"{path}: no model configuration {name} is available ({reason}); give a folder with a config.json"
            ) from None

    if path.suffix in (".yaml", ".yml"):
        model = load_config(path).model
        if isinstance(model, CheckpointConfig):
            return read_cost(Path(model.checkpoint))
        vision = read(model.encoder.name)
        flops = forward_flops(read(model.llm), getattr(vision, "vision_config", vision), model.encoder.layer)
        return derive_cost(flops)
    if not path.exists():
        raise UsageError(f"{path}: no such file; expected a folder with a config.json, or a YAML configuration")
    whole = read(path.parent if path.name == "config.json" else path)
    if not hasattr(whole, "text_config") or not hasattr(whole, "vision_config"):
        raise UsageError(
            f"{path}: a {whole.model_type} model without text_config and vision_config: expected a LLaVA model"
        )
    layers = getattr(whole, "vision_feature_layer", -2)
    return derive_cost(forward_flops(whole.text_config, whole.vision_config, layers))
