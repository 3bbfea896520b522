"""The plain backend: the whole model on every rank, gradients exchanged by DistributedDataParallel.

Both backends give AdamW's state by parameter name: the same for one rank, for many, and for any ZeRO stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import AdamW

from anyres_vlm.model.vlm import VisionLanguageModel
from anyres_vlm.schema import Batch

MOMENTS = ("exp_avg", "exp_avg_sq")
ReadTensor = Callable[[str], Tensor]
"""Returns a saved tensor by its name, on the CPU."""


@dataclass(frozen=True)
class Snapshot:
    """A copy of what training changes, on rank 0; the other ranks hold no tensors.

    `weights` has the trained parameters in fp32, by name; `moments` has `NAME.exp_avg` and `NAME.exp_avg_sq` of each,
    or nothing before the first of AdamW's `updates`.
    """

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    updates: int


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters that the optimizer updates, by name; a tied parameter comes once."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def blank_entry(tensor: Tensor, updates: int) -> dict[str, Tensor]:
    """Return AdamW's state of a tensor after so many updates, moments still zero; fused AdamW counts on the device."""
    count = torch.tensor(float(updates), device=tensor.device)
    return {"step": count, **{moment: torch.zeros_like(tensor) for moment in MOMENTS}}


class PlainBackend:
    """Forward, backward and update through accelerate, in one process or under a launcher."""

    def __init__(
        self, accelerator: Accelerator, model: VisionLanguageModel, optimizer: AdamW, max_grad_norm: float
    ) -> None:
        self._accelerator, self._max_grad_norm = accelerator, max_grad_norm
        self._model, self._optimizer = accelerator.prepare(model, optimizer)
        self._adamw, self._module = optimizer, model

    def micro_step(self, batch: Batch, scale: float, *, is_last: bool) -> Tensor:
        """Add a pack's scaled gradient; ranks exchange gradients at the last pack. Returns its summed loss, ()."""
        with nullcontext() if is_last else self._accelerator.no_sync(self._model):
            loss: Tensor = self._model(batch)
            self._accelerator.backward(loss * scale)
        return loss.detach()

    def update(self) -> float:
        """Clip by the global norm and update, unless the norm is not finite. Returns the norm before clipping."""
        norm = float(self._accelerator.clip_grad_norm_(self._model.parameters(), self._max_grad_norm))
        if math.isfinite(norm):
            self._optimizer.step()
        # Gradients are views of DDP's buckets. If they were set to None, the next step would allocate a second copy.
        self._optimizer.zero_grad(set_to_none=self._accelerator.num_processes == 1)
        return norm

    def snapshot(self) -> Snapshot:
        """Copy the state to rank 0, so that training can continue while it is written."""
        if not self._accelerator.is_main_process:
            return Snapshot({}, {}, 0)
        weights: dict[str, Tensor] = {}
        moments: dict[str, Tensor] = {}
        updates = 0
        for name, parameter in trained_parameters(self._module):
            weights[name] = parameter.detach().to("cpu", copy=True)
            if self._adamw.state:
                entry = self._adamw.state[parameter]
                moments |= {f"{name}.{moment}": entry[moment].to("cpu", copy=True) for moment in MOMENTS}
                updates = int(entry["step"])
        return Snapshot(weights, moments, updates)

    def weights(self) -> dict[str, Tensor]:
        """Return the whole model's state dict on the CPU, on rank 0; nothing on the others."""
        if not self._accelerator.is_main_process:
            return {}
        return {name: tensor.cpu() for name, tensor in self._module.state_dict().items()}

    def restore(self, updates: int, read: ReadTensor) -> None:
        """Load a saved optimizer state; the model has the saved weights already."""
        if not updates:
            return
        for name, parameter in trained_parameters(self._module):
            entry = blank_entry(parameter, updates)
            for moment in MOMENTS:
                entry[moment].copy_(read(f"{name}.{moment}"))
            self._adamw.state[parameter] = entry
