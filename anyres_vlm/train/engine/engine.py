"""One optimizer step over all ranks, whatever splits the model: the seam between the training loop and its backends."""

from __future__ import annotations

import logging
import math
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Literal, cast

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.distributed import init_process_group, is_initialized
from torch.optim import AdamW

from anyres_vlm.config import RunConfig, StageName
from anyres_vlm.errors import UsageError
from anyres_vlm.model.vlm import VisionLanguageModel
from anyres_vlm.schema import Batch
from anyres_vlm.train.engine.deepspeed_settings import DeepSpeedSettings, find_preset, resolve_deepspeed
from anyres_vlm.train.engine.plain import PlainBackend
from anyres_vlm.train.engine.ranks import adopt_slurm_ranks
from anyres_vlm.train.engine.state import ReadTensor, Snapshot

if TYPE_CHECKING:  # DeepSpeed is optional
    from anyres_vlm.train.engine.zero import ZeroBackend

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepResult:
    """One optimizer step over all ranks: loss in nats a supervised token, gradient norm before clipping, counts.

    A step whose loss or gradient is not finite leaves the weights alone: `is_skipped`.
    """

    loss: float
    grad_norm: float
    supervised_tokens: int
    tokens: int
    pairs: int  # of a token and one that it sees: itself and those before it in its document
    tiles: int
    samples: int
    rejects: int
    stop: bool  # whether any rank asked to stop, and to save, behind this step
    save: bool

    @property
    def is_skipped(self) -> bool:
        """Whether the step was not finite."""
        return not (math.isfinite(self.loss) and math.isfinite(self.grad_norm))


class Engine:
    """The ranks of a run, and on them one stage's model and optimizer."""

    def __init__(self, precision: Literal["fp32", "bf16"], rank_timeout_minutes: float) -> None:
        adopt_slurm_ranks()
        has_device = torch.accelerator.is_available()
        if not has_device:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, where installed, warns that it found none
        # Said outright: under a launcher, accelerate takes several CPU ranks for single processes otherwise.
        self._accelerator = Accelerator(
            cpu=not has_device,
            mixed_precision="bf16" if precision == "bf16" else "no",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=rank_timeout_minutes))],
        )
        self.rank: int = self._accelerator.process_index
        self.world_size: int = self._accelerator.num_processes
        self.is_main: bool = self._accelerator.is_main_process
        self.is_cuda: bool = self._accelerator.device.type == "cuda"

    def read_deepspeed(self, config: RunConfig, stage: StageName) -> DeepSpeedSettings | None:
        """Read the stage's DeepSpeed settings; None without any, or where they split nothing.

        Raises `UsageError` for settings that contradict the run or are not DeepSpeed's, and without DeepSpeed.
        """
        if (name := config.stage(stage).deepspeed) is None:
            return None
        settings = resolve_deepspeed(
            find_preset(name), config, stage, ranks=self.world_size, has_cuda=torch.cuda.is_available()
        )
        for warning in settings.warnings if self.is_main else ():
            logger.warning("%s: %s", stage, warning)
        if settings.zero_stage == 0:
            return None
        if settings.zero_stage == 3 and config.cache_features is not None:
            raise UsageError(
                "cache_features does not go with ZeRO-3, where an encoder runs on all ranks or on none: use zero2, or "
                "leave the cache out"
            )
        try:
            from anyres_vlm.train.engine.zero import check_zero  # optional: the extra `deepspeed`
        except ModuleNotFoundError:
            raise UsageError("--deepspeed needs DeepSpeed: pip install 'anyres-vlm[deepspeed]'") from None
        check_zero(settings)
        return settings

    def prepare(
        self,
        model: VisionLanguageModel,
        optimizer: AdamW,
        max_grad_norm: float,
        deepspeed: DeepSpeedSettings | None = None,
    ) -> None:
        """Move the model to this rank's device: whole, or split as DeepSpeed's settings say."""
        self._backend: PlainBackend | ZeroBackend
        if deepspeed is None:
            self._backend = PlainBackend(self._accelerator, model, optimizer, max_grad_norm)
            return
        from anyres_vlm.train.engine.zero import ZeroBackend  # optional: the extra `deepspeed`

        settings = deepspeed.sized(model.language_model.config.hidden_size)
        if not is_initialized():  # one process without a launcher is a world of its own
            init_process_group(store=HashStore(), rank=0, world_size=1)
            os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for what a launcher would have set
        self._backend = ZeroBackend(model, optimizer, settings, self._accelerator.device, is_main=self.is_main)

    def seed(self, seed: int, step: int) -> None:
        """Seed what the next optimizer step draws on this rank (dropout), on every device."""
        torch.manual_seed(random.Random(f"{seed} {step} {self.rank}").getrandbits(63))

    def step(self, batches: Sequence[Batch], *, stop: bool = False, save: bool = False) -> StepResult:
        """One optimizer step over this rank's packs, equal to one big batch over all ranks' samples.

        Every rank passes the same number of packs. The summed loss is divided once, by the supervised tokens of the
        whole step; the factor `world_size` undoes the mean that the gradient exchange takes. What one rank asks for
        travels with the counts, so that all agree on it at no cost.
        """
        counts = torch.tensor(
            [
                sum(batch.num_supervised for batch in batches),
                sum(batch.input_ids.numel() for batch in batches),
                sum(batch.num_pairs for batch in batches),
                sum(len(batch.tiles) for batch in batches),
                sum(len(batch.sample_ids) for batch in batches),
                sum(len(batch.rejects) for batch in batches),
                int(stop),
                int(save),
            ]
        )
        supervised, tokens, pairs, tiles, samples, rejects, stops, saves = (int(count) for count in self.sum(counts))
        scale = self.world_size / max(supervised, 1)
        losses = [
            self._backend.micro_step(batch.to(self._accelerator.device), scale, is_last=batch is batches[-1])
            for batch in batches
        ]
        grad_norm = self._backend.update()
        total = float(self.sum(torch.stack(losses).sum()))
        result = StepResult(
            loss=total / max(supervised, 1),
            grad_norm=grad_norm,
            supervised_tokens=supervised,
            tokens=tokens,
            pairs=pairs,
            tiles=tiles,
            samples=samples,
            rejects=rejects,
            stop=stops > 0,
            save=saves > 0,
        )
        if result.is_skipped:
            _report(batches, losses)
        return result

    def snapshot(self, *, with_moments: bool = True) -> Snapshot:
        """A copy of weights and optimizer state on rank 0. Called on all ranks together."""
        return self._backend.snapshot(with_moments=with_moments)

    def restore(self, updates: int, read: ReadTensor) -> None:
        """Put a saved optimizer state in place, on all ranks; `prepare` was given the saved weights."""
        self._backend.restore(updates, read)

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


def _report(batches: Sequence[Batch], losses: Sequence[Tensor]) -> None:
    """Name the samples of the packs whose loss is not finite; of all packs where only a gradient is not."""
    bad = [batch for batch, loss in zip(batches, losses, strict=True) if not math.isfinite(float(loss))]
    for batch in bad or batches:
        what = "loss" if bad else "gradient of the step"
        logger.warning("the %s is not finite; samples of the pack: %s", what, ", ".join(batch.sample_ids))
