"""The plain backend: the whole model on every rank, gradients exchanged by DistributedDataParallel."""

from __future__ import annotations

import math
from contextlib import nullcontext

from accelerate import Accelerator
from torch import Tensor
from torch.optim import AdamW

from anyres_vlm.model.vlm import VisionLanguageModel
from anyres_vlm.schema import Batch
from anyres_vlm.train.engine.state import MOMENTS, ReadTensor, Snapshot, blank_entry, trained_parameters


class PlainBackend:
    """Forward, backward and update through accelerate, in one process or under a launcher."""

    def __init__(
        self, accelerator: Accelerator, model: VisionLanguageModel, optimizer: AdamW, max_grad_norm: float
    ) -> None:
        self._accelerator, self._max_grad_norm = accelerator, max_grad_norm
        self._model, self._optimizer = accelerator.prepare(model, optimizer)
        self._adamw, self._module = optimizer, model

    def micro_step(self, batch: Batch, scale: float, *, is_last: bool) -> Tensor:
        """Add a pack's scaled gradient; ranks exchange at the last one. Returns its summed loss, ()."""
        with nullcontext() if is_last else self._accelerator.no_sync(self._model):
            loss: Tensor = self._model(batch)
            self._accelerator.backward(loss * scale)
        return loss.detach()

    def update(self) -> float:
        """Clip by the global norm and update, unless the norm is not finite. Returns the norm before clipping."""
        norm = float(self._accelerator.clip_grad_norm_(self._model.parameters(), self._max_grad_norm))
        if math.isfinite(norm):
            self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def snapshot(self, *, with_moments: bool) -> Snapshot:
        """Copies on rank 0: training may go on while they are written."""
        if not self._accelerator.is_main_process:
            return Snapshot({}, {}, 0)
        moments: dict[str, Tensor] = {}
        updates = 0
        for name, parameter in trained_parameters(self._module) if with_moments and self._adamw.state else ():
            entry = self._adamw.state[parameter]
            moments |= {f"{name}.{moment}": entry[moment].to("cpu", copy=True) for moment in MOMENTS}
            updates = int(entry["step"])
        trained = {parameter.data_ptr() for _, parameter in trained_parameters(self._module)}
        weights = {
            name: tensor.to("cpu", copy=tensor.data_ptr() in trained)
            for name, tensor in self._module.state_dict().items()
        }
        return Snapshot(weights, moments, updates)

    def restore(self, updates: int, read: ReadTensor) -> None:
        """Put a saved optimizer state in place; the weights are in the model already."""
        if not updates:
            return
        for name, parameter in trained_parameters(self._module):
            entry = blank_entry(parameter, updates)
            for moment in MOMENTS:
                entry[moment].copy_(read(f"{name}.{moment}"))
            self._adamw.state[parameter] = entry
