"""AdamW's state by parameter name: the same for one rank, for many, and for any ZeRO stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
ReadTensor = Callable[[str], Tensor]
"""A saved tensor by its name, on the CPU."""


@dataclass(frozen=True)
class Snapshot:
    """A copy of what training has made so far, on rank 0; the other ranks hold no tensors.

    `weights` is the whole model under the names of a checkpoint; `moments` has `NAME.exp_avg` and `NAME.exp_avg_sq` of
    each trained parameter in fp32, or nothing before the first of AdamW's `updates`.
    """

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    updates: int


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What the optimizer moves, by name; a tied parameter comes once."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def blank_entry(tensor: Tensor, updates: int) -> dict[str, Tensor]:
    """AdamW's entry for a tensor after so many updates, moments still zero; fused AdamW counts on the device."""
    count = torch.tensor(float(updates), device=tensor.device)
    return {"step": count, **{moment: torch.zeros_like(tensor) for moment in MOMENTS}}
