"""Vision encoders: uint8 tiles in, patch features out, nothing computed behind the chosen layer.

Both keep the wrapped network under `vision_model`, so that the parameters of a CLIP encoder carry the names they have
in released LlavaNext checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel

from anyres_vlm.errors import UsageError


class Encoder(nn.Module):
    """What the two encoders share: tile geometry, feature width Dv and normalisation on the device."""

    mean: Tensor
    std: Tensor
    layers_used: int

    def __init__(self, tile: int, patch: int, width: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.tile = tile
        self.patch = patch
        self.width = width
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def normalise(self, tiles: Tensor) -> Tensor:
        """Scale to [0, 1], subtract the mean, divide by the deviation. (T, 3, S, S) uint8 -> float."""
        dtype = next(self.parameters()).dtype
        return ((tiles.to(torch.float32) / 255 - self.mean) / self.std).to(dtype)

    def forward(self, tiles: Tensor) -> Tensor:
        """Patch features without CLS. (T, 3, S, S) uint8 -> (T, P, Dv)."""
        raise NotImplementedError


class ClipEncoder(Encoder):
    """A CLIP vision transformer of transformers; `layer` indexes the hidden states as LLaVA does (-2)."""

    def __init__(self, vision_model: CLIPVisionModel, layer: int, mean: Sequence[float], std: Sequence[float]) -> None:
        config: Any = vision_model.config
        super().__init__(config.image_size, config.patch_size, config.hidden_size, mean, std)
        depth = config.num_hidden_layers
        if not -depth - 1 <= layer <= depth:
            raise UsageError(
                f"encoder layer {layer}: the encoder has {depth} layers, choose from -{depth + 1} to {depth}"
            )
        self.layers_used = layer % (depth + 1)
        self.vision_model = vision_model

    def forward(self, tiles: Tensor) -> Tensor:
        """Patch features without CLS. (T, 3, S, S) uint8 -> (T, P, Dv)."""
        vision = self.vision_model
        hidden = vision.pre_layrnorm(vision.embeddings(self.normalise(tiles)))
        for layer in vision.encoder.layers[: self.layers_used]:
            hidden = layer(hidden, attention_mask=None)
        features: Tensor = hidden[:, 1:]
        return features


class TimmEncoder(Encoder):
    """Any plain vision transformer of timm (CLIP, SigLIP, DINOv2), by its intermediate features."""

    def __init__(self, vision_model: Any, layer: int, mean: Sequence[float], std: Sequence[float]) -> None:
        if not hasattr(vision_model, "forward_intermediates") or not hasattr(vision_model, "blocks"):
            raise UsageError(f"{type(vision_model).__name__} is not a vision transformer of timm: choose a vit_* model")
        depth = len(vision_model.blocks)
        if not (-depth <= layer < 0):
            raise UsageError(f"encoder layer {layer}: the encoder has {depth} layers, choose from -{depth} to -1")
        embed = vision_model.patch_embed
        super().__init__(embed.img_size[0], embed.patch_size[0], vision_model.embed_dim, mean, std)
        self.layers_used = depth + layer + 1
        self.vision_model = vision_model

    def forward(self, tiles: Tensor) -> Tensor:
        """Patch features without prefix tokens. (T, 3, S, S) uint8 -> (T, P, Dv)."""
        (features,) = self.vision_model.forward_intermediates(
            self.normalise(tiles),
            indices=[self.layers_used - 1],
            norm=False,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        assert isinstance(features, Tensor)
        return features
