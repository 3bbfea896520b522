"""Vision encoders: uint8 tiles in, patch features out, nothing computed behind the deepest chosen layer.

A layer is named by its hidden state: `k` is what `k` blocks give and negative numbers count from the last block's, so
that -2 is LLaVA's. Features are taken as they are, before the final norm: the convention of transformers'
`hidden_states` for CLIP and of timm's `forward_intermediates` (`norm=False` is its default; DINOv2's own evaluation
norms them). Several layers are concatenated along the width in the order given, as stock LlavaNext does.

Both encoders keep the wrapped network under `vision_model`, so that the parameters of a CLIP encoder carry the names
they have in released LlavaNext checkpoints.
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
    """What the two encoders share: tile geometry, feature width Dv and normalisation on the device.

    `layers` are the hidden states that the features come from, as numbers of blocks.
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
        """Scale to [0, 1], subtract the mean, divide by the deviation. (T, 3, S, S) uint8 -> float."""
        dtype = next(self.parameters()).dtype
        return ((tiles.to(torch.float32) / 255 - self.mean) / self.std).to(dtype)

    def forward(self, tiles: Tensor) -> Tensor:
        """Patch features without CLS. (T, 3, S, S) uint8 -> (T, P, Dv)."""
        raise NotImplementedError

    def unused_parameters(self) -> Iterator[nn.Parameter]:
        """What no feature depends on. Among the trained parameters, ranks would wait for gradients that never come."""
        yield from ()


class ClipEncoder(Encoder):
    """A CLIP vision transformer of transformers. Layers behind the deepest chosen one stay, as stock expects them."""

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
            if number in self.layers:  # the others are freed while the encoder is frozen
                states[number] = hidden
        return torch.cat([states[layer][:, 1:] for layer in self.layers], dim=-1)

    def unused_parameters(self) -> Iterator[nn.Parameter]:
        """The blocks behind the deepest chosen one and the norm behind the last."""
        yield from self.vision_model.encoder.layers[max(self.layers) :].parameters()
        yield from self.vision_model.post_layernorm.parameters()


class TimmEncoder(Encoder):
    """Any plain vision transformer of timm (CLIP, SigLIP, DINOv2, EVA), by its intermediate features.

    What lies behind the deepest chosen layer is cut off by timm's own `prune_intermediate_layers`.
    """

    def __init__(
        self, vision_model: Any, layer: int | Sequence[int], mean: Sequence[float], std: Sequence[float]
    ) -> None:
        tile, patch = plain_geometry(vision_model)
        layers = _hidden_states(layer, len(vision_model.blocks), first=1)  # timm gives none before the first block
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


def plain_geometry(network: Any) -> tuple[int, int]:
    """Tile and patch side in pixels of a plain vision transformer of timm: one resolution, square tiles and patches.

    A network of dynamic image size counts as one of the size it was built for, which is that of every tile. Raises
    `UsageError` for any other network.
    """
    kind, embed = type(network).__name__, getattr(network, "patch_embed", None)
    is_plain = all(hasattr(network, name) for name in ("blocks", "num_prefix_tokens", "prune_intermediate_layers"))
    if not is_plain or not isinstance(embed, PatchEmbed):
        raise UsageError(
            f"encoder {kind} is not a plain vision transformer of timm: choose a vit_*, deit3_* or eva02_*"
        )
    if embed.img_size is None:
        raise UsageError(f"encoder {kind} is built for no image size of its own: set encoder.tile")
    (height, width), (patch_height, patch_width) = embed.img_size, embed.patch_size
    if height != width or patch_height != patch_width:
        raise UsageError(
            f"encoder {kind} takes images {height} high and {width} wide in patches {patch_height} high and "
            f"{patch_width} wide: expected squares, set encoder.tile or choose another"
        )
    if height % patch_height:
        nearest = max(height // patch_height, 1) * patch_height
        raise UsageError(
            f"encoder tile of {height} pixels is no multiple of its patches of {patch_height}: "
            f"set encoder.tile={nearest}"
        )
    return height, patch_height


def _hidden_states(layer: int | Sequence[int], depth: int, first: int) -> tuple[int, ...]:
    """The numbers of blocks behind which to read, of an encoder whose readable states are `first` to `depth`."""
    named = (layer,) if isinstance(layer, int) else tuple(layer)
    states = tuple(number + depth + 1 if number < 0 else number for number in named)
    for number, state in zip(named, states, strict=True):
        if not first <= state <= depth:
            raise UsageError(
                f"encoder layer {number}: the encoder has {depth} layers, choose from {first} to {depth} or "
                f"from {first - depth - 1} to -1"
            )
    return states
