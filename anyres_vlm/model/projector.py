"""The projector between encoder and language model; parameter names are those of LlavaNext."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

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
