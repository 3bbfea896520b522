"""The only module that knows ranks and devices: accelerate runs the step, in one process or under a launcher."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, cast

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import AdamW

from anyres_vlm.model.vlm import VisionLanguageModel
from anyres_vlm.schema import Batch


@dataclass(frozen=True)
class StepResult:
    """One optimizer step over all ranks: loss in nats a supervised token, gradient norm before clipping, counts."""

    loss: float
    grad_norm: float
    supervised_tokens: int
    tokens: int
    samples: int
    rejects: int


class Engine:
    """Forward, backward and step over all ranks; the seam behind which DeepSpeed comes."""

    def __init__(self, precision: Literal["fp32", "bf16"]) -> None:
        # Said outright: under a launcher, accelerate takes several CPU ranks for single processes otherwise.
        self._accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(), mixed_precision="bf16" if precision == "bf16" else "no"
        )
        self.rank: int = self._accelerator.process_index
        self.world_size: int = self._accelerator.num_processes
        self.is_main: bool = self._accelerator.is_main_process
        self.is_cuda: bool = self._accelerator.device.type == "cuda"

    def prepare(self, model: VisionLanguageModel, optimizer: AdamW) -> None:
        """Move the model to this rank's device and wrap it for gradient exchange."""
        self._model, self._optimizer = self._accelerator.prepare(model, optimizer)

    def seed(self, seed: int, step: int) -> None:
        """Seed what the next optimizer step draws on this rank (dropout), on every device."""
        torch.manual_seed(random.Random(f"{seed} {step} {self.rank}").getrandbits(63))

    def step(self, batches: Sequence[Batch], max_grad_norm: float) -> StepResult:
        """One optimizer step over this rank's packs, equal to one big batch over all ranks' samples.

        Every rank passes the same number of packs. The summed loss is divided once, by the supervised tokens of the
        whole step; the factor `world_size` undoes the mean that the gradient exchange takes.
        """
        counts = torch.tensor(
            [
                sum(batch.num_supervised for batch in batches),
                sum(batch.input_ids.numel() for batch in batches),
                sum(len(batch.sample_ids) for batch in batches),
                sum(len(batch.rejects) for batch in batches),
            ]
        )
        supervised, *others = (int(count) for count in self.sum(counts))
        total = torch.zeros((), device=self._accelerator.device)
        for position, batch in enumerate(batches):
            is_last = position == len(batches) - 1
            with nullcontext() if is_last else self._accelerator.no_sync(self._model):
                loss = self._model(batch.to(self._accelerator.device))
                self._accelerator.backward(loss * (self.world_size / max(supervised, 1)))
            total += loss.detach()
        grad_norm = self._accelerator.clip_grad_norm_(self._model.parameters(), max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return StepResult(float(self.sum(total)) / max(supervised, 1), float(grad_norm), supervised, *others)

    def weights(self) -> dict[str, Tensor]:
        """The whole model's state on this rank, under the names of a checkpoint."""
        return cast(dict[str, Tensor], self._accelerator.get_state_dict(self._model))

    def wait(self) -> None:
        """Return once every rank has come here."""
        self._accelerator.wait_for_everyone()

    def close(self) -> None:
        """Leave the process group."""
        self._accelerator.end_training()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block on rank 0 before the others: what it writes is there when they read."""
        with self._accelerator.main_process_first():
            yield

    def sum(self, tensor: Tensor) -> Tensor:
        """A tensor added up over all ranks."""
        return cast(Tensor, self._accelerator.reduce(tensor.to(self._accelerator.device), reduction="sum"))
