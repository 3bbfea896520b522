"""Vision encoders: from uint8 tiles to patch features, without computing layers after the deepest chosen one.

A layer is named by its hidden state: `k` is the state after `k` blocks, and negative numbers count back from the state
after the last block, so -2 is the layer LLaVA uses. Features are taken before the final norm, as in
transformers' `hidden_states` for CLIP and timm's `forward_intermediates` (`norm=False` is its default; DINOv2's own
evaluation normalises them). Several layers are concatenated along the width in the given order, as in stock LlavaNext.

Both encoders keep the wrapped network under `vision_model`, so the parameters of a CLIP encoder have the same names as
in released LlavaNext checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn
from transformers import CLIPVisionModel

from anyres_vlm.errors import UsageError


class Encoder(nn.Module):
    """Base of the two encoders: tile geometry, feature width Dv and normalisation on the device.

    `layers` are the numbers of the hidden states that make up the features.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, tile: int, patch: int, width: int, layers: tuple[int, ...], mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.tile = tile
        self.patch = patch
        self.width = width * len(layers)
        self.layers = layers
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def normalise(self, tiles: Tensor) -> Tensor:
        """Scale to [0, 1], subtract the mean, divide by the standard deviation. (T, 3, S, S) uint8 -> float."""
        dtype = next(self.parameters()).dtype
        return ((tiles.to(torch.float32) / 255 - self.mean) / self.std).to(dtype)

    def forward(self, tiles: Tensor) -> Tensor:
        """Patch features without CLS. (T, 3, S, S) uint8 -> (T, P, Dv)."""
        raise NotImplementedError

    def enable_checkpointing(self) -> None:
        """Recompute the activations of each block in the backward pass."""
        raise NotImplementedError

    def unused_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters no feature depends on: if trained, ranks would wait for gradients that never arrive."""
        yield from ()


class ClipEncoder(Encoder):
    """A CLIP vision transformer of transformers. Unused layers are kept, because stock LlavaNext expects them."""

    def __init__(
        self, vision_model: CLIPVisionModel, layer: int | Sequence[int], mean: Sequence[float], std: Sequence[float]
    ) -> None:
        config: Any = vision_model.config
        layers = _hidden_states(layer, config.num_hidden_layers, first=0)
        super().__init__(config.image_size, config.patch_size, config.hidden_size, layers, mean, std)
        self.vision_model = vision_model

    def forward(self, tiles: Tensor) -> Tensor:
        """Patch features without CLS. (T, 3, S, S) uint8 -> (T, P, Dv)."""
        vision = self.vision_model
        hidden = vision.pre_layrnorm(vision.embeddings(self.normalise(tiles)))
        states = {0: hidden}
        for number, block in enumerate(vision.encoder.layers[: max(self.layers)], start=1):
            hidden = block(hidden, attention_mask=None)
            if number in self.layers:  # others are freed at once while the encoder is frozen
                states[number] = hidden
        return torch.cat([states[layer][:, 1:] for layer in self.layers], dim=-1)

    def enable_checkpointing(self) -> None:
        """Recompute the activations of each block in the backward pass."""
        self.vision_model.activation_checkpointing_enable()

    def unused_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of the blocks after the deepest chosen one and of the final norm."""
        yield from self.vision_model.encoder.layers[max(self.layers) :].parameters()
        yield from self.vision_model.post_layernorm.parameters()


class TimmEncoder(Encoder):
    """Any plain vision transformer of timm (CLIP, SigLIP, DINOv2, EVA), read at intermediate layers.

    Layers after the deepest chosen one are removed by timm's `prune_intermediate_layers`.
    """

    def __init__(
        self, vision_model: Any, layer: int | Sequence[int], mean: Sequence[float], std: Sequence[float]
    ) -> None:
        tile, patch = plain_geometry(vision_model)
        layers = _hidden_states(
            layer, len(vision_model.blocks), first=1
        )  # timm returns no state before the first block
        super().__init__(tile, patch, vision_model.embed_dim, layers, mean, std)
        vision_model.prune_intermediate_layers([max(layers) - 1], prune_norm=True, prune_head=True)
        self.vision_model = vision_model

    def forward(self, tiles: Tensor) -> Tensor:
        """Patch features without class and register tokens. (T, 3, S, S) uint8 -> (T, P, Dv)."""
        ascending = sorted(set(self.layers))  # the order in which timm returns them
        features: list[Tensor] = self.vision_model.forward_intermediates(
            self.normalise(tiles),
            indices=[layer - 1 for layer in ascending],
            norm=False,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        return torch.cat([features[ascending.index(layer)] for layer in self.layers], dim=-1)

    def enable_checkpointing(self) -> None:
        """Recompute the activations of each block in the backward pass."""
        self.vision_model.set_grad_checkpointing()


def plain_geometry(network: Any) -> tuple[int, int]:
    """Return tile and patch side in pixels of a plain vision transformer of timm with square tiles and patches.

    For a network with dynamic image size, the tile is the size it was built for. Raises `UsageError` for any other
    network.
    """
    kind, embed = type(network).__name__, getattr(network, "patch_embed", None)
    is_plain = all(hasattr(network, name) for name in ("blocks", "num_prefix_tokens", "prune_intermediate_layers"))
    if not is_plain or not isinstance(embed, PatchEmbed):
        raise UsageError(
            f"encoder {kind} is not a plain vision transformer of timm: choose a vit_*, deit3_* or eva02_*"
        )
    if embed.img_size is None:
        raise UsageError(f"encoder {kind} has no default image size: set encoder.tile")
    (height, width), (patch_height, patch_width) = embed.img_size, embed.patch_size
    if height != width or patch_height != patch_width:
        raise UsageError(
            f"encoder {kind} takes images of {width}x{height} pixels in patches of {patch_width}x{patch_height}: "
            "expected squares, set encoder.tile or choose another encoder"
        )
    if height % patch_height:
        nearest = max(height // patch_height, 1) * patch_height
        raise UsageError(
            f"encoder tile of {height} pixels is not a multiple of the patch size of {patch_height}: "
            f"set encoder.tile={nearest}"
        )
    return height, patch_height


def _hidden_states(layer: int | Sequence[int], depth: int, first: int) -> tuple[int, ...]:
    """Resolve layer numbers to hidden states between `first` and `depth`. Raises `UsageError` for others."""
    named = (layer,) if isinstance(layer, int) else tuple(layer)
    states = tuple(number + depth + 1 if number < 0 else number for number in named)
    for number, state in zip(named, states, strict=True):
        if not first <= state <= depth:
            raise UsageError(
                f"encoder layer {number}: the encoder has {depth} layers, choose from {first} to {depth} or "
                f"from {first - depth - 1} to -1"
            )
    return states
