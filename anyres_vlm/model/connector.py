"""What joins encoder and language model: the projector, and tiles merged to an image's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from anyres_vlm.geometry import TilePlan

ProjectorKind = Literal["linear", "mlp2x_gelu"]


class LinearProjector(nn.Module):
    """One linear map (LLaVA-1.0)."""

    def __init__(self, vision_width: int, text_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(vision_width, text_width)

    def forward(self, features: Tensor) -> Tensor:
        """Project patch features. (T, P, Dv) -> (T, P, D)."""
        projected: Tensor = self.linear(features)
        return projected


class MlpProjector(nn.Module):
    """Linear, GELU, linear (LLaVA-1.5 and LLaVA-NeXT): 1024 -> 4096 -> 4096 has 21.0M parameters."""

    def __init__(self, vision_width: int, text_width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision_width, text_width)
        self.linear_2 = nn.Linear(text_width, text_width)

    def forward(self, features: Tensor) -> Tensor:
        """Project patch features. (T, P, Dv) -> (T, P, D)."""
        projected: Tensor = self.linear_2(F.gelu(self.linear_1(features)))
        return projected


def build_projector(kind: ProjectorKind, vision_width: int, text_width: int) -> nn.Module:
    """Build a projector from width Dv, the total width of all chosen layers, to D.

    Initialised by the default of `nn.Linear`, uniform within 1 / sqrt(inputs), as in the original LLaVA; stock
    LlavaNext draws from a normal distribution.
    """
    return (LinearProjector if kind == "linear" else MlpProjector)(vision_width, text_width)


def merge_tiles(features: Tensor, plans: Sequence[TilePlan], newline: Tensor) -> Tensor:
    """Return the tokens of all images in order. (T, P, D), newline (D,) -> (N of all images, D).

    The tokens of an image are those of its thumbnail, then those of its grid: `spatial_unpad` joins the tiles into one
    picture, removes the padding and appends the newline to every row; `flat` concatenates the tiles.
    """
    assert features.shape[0] == sum(plan.num_tiles for plan in plans), "tiles and plans come from the same images"
    tokens: list[Tensor] = []
    for tiles, plan in zip(torch.split(features, [plan.num_tiles for plan in plans]), plans, strict=True):
        tokens.append(tiles[0])
        if plan.layout == "flat":
            tokens.append(rearrange(tiles[1:], "t p d -> (t p) d"))
        elif plan.num_tiles > 1:
            tokens.append(_unpad(tiles[1:], plan, newline))
    return torch.cat(tokens)


def _unpad(tiles: Tensor, plan: TilePlan, newline: Tensor) -> Tensor:
    picture = rearrange(tiles, "(r c) (h w) d -> (r h) (c w) d", r=plan.grid.rows, c=plan.grid.cols, h=plan.side)
    kept = picture[plan.kept_top :, plan.kept_left :][: plan.kept_rows, : plan.kept_cols]
    ends = repeat(newline.to(kept.dtype), "d -> r 1 d", r=plan.kept_rows)
    return rearrange(torch.cat([kept, ends], dim=1), "r c d -> (r c) d")
