"""Merge projected tiles into image tokens, following the tile plan that counted them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange, repeat
from torch import Tensor

from anyres_vlm.geometry import TilePlan


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
