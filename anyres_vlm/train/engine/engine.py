"""One optimizer step over all ranks, whatever splits the model: the interface between training loop and backends.

Trackers (wandb, trackio) are here as well, because accelerate drives them.
"""

from __future__ import annotations

import logging
import math
import os
import random
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, gather_object
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.distributed import init_process_group, is_initialized
from torch.optim import AdamW

from anyres_vlm.config import RunConfig, StageName
from anyres_vlm.errors import UsageError
from anyres_vlm.model.attention import disable_cudnn_attention
from anyres_vlm.model.device import unusable_gpu
from anyres_vlm.model.kernels import require_kernels
from anyres_vlm.model.vlm import VisionLanguageModel
from anyres_vlm.schema import Batch
from anyres_vlm.train.engine.deepspeed_settings import DeepSpeedSettings, find_preset, resolve_deepspeed
from anyres_vlm.train.engine.plain import PlainBackend, ReadTensor, Snapshot
from anyres_vlm.train.engine.ranks import adopt_slurm_ranks

if TYPE_CHECKING:  # DeepSpeed is optional
    from anyres_vlm.train.engine.zero import ZeroBackend

logger = logging.getLogger(__name__)

Value = TypeVar("Value")
PROJECT = "anyres-vlm"
ID_FILE = "tracker_id"  # in the stage's folder: a resumed stage continues the same tracked run


@dataclass(frozen=True)
class StepResult:
    """One optimizer step over all ranks: loss in nats per supervised token, gradient norm before clipping, counts.

    A step whose loss or gradient is not finite does not change the weights: `is_skipped`.
    """

    loss: float
    grad_norm: float
    supervised_tokens: int
    tokens: int
    pairs: int  # of a token and one it attends to: itself and those before it in its document
    tiles: int
    samples: int
    rejects: int
    stop: bool  # whether any rank asked to stop, and to save, after this step
    save: bool

    @property
    def is_skipped(self) -> bool:
        """Whether the step was not finite."""
        return not (math.isfinite(self.loss) and math.isfinite(self.grad_norm))


class Engine:
    """The ranks of a run, and on them one stage's model and optimizer."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.rank: int = accelerator.process_index
        self.world_size: int = accelerator.num_processes
        self.is_main: bool = accelerator.is_main_process
        self.device: torch.device = accelerator.device
        self.is_cuda: bool = accelerator.device.type == "cuda"

    @classmethod
    def start(cls, precision: Literal["fp32", "bf16"], rank_timeout_minutes: float) -> Engine:
        """Join the ranks that a launcher or `srun` started; one process alone is a run of one rank.

        Raises `UsageError` for a GPU that torch was built for but cannot use.
        """
        if (fault := unusable_gpu()) is not None:
            raise UsageError(": ".join(fault))
        adopt_slurm_ranks()
        disable_cudnn_attention()
        has_device = torch.accelerator.is_available()
        if not has_device:
            os.environ.setdefault(
                "DS_ACCELERATOR", "cpu"
            )  # otherwise DeepSpeed, if installed, warns that it found none
        # `cpu` is set explicitly: otherwise accelerate treats several CPU ranks under a launcher as single processes.
        accelerator = Accelerator(
            cpu=not has_device,
            mixed_precision="bf16" if precision == "bf16" else "no",
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(minutes=rank_timeout_minutes)),
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            ],
        )
        return cls(accelerator)

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
        require_kernels(config.kernels, zero_stage=settings.zero_stage)
        if settings.zero_stage == 3 and config.cache_features is not None:
            raise UsageError(
                "cache_features does not work with ZeRO-3, where an encoder runs on all ranks or on none: use zero2, "
                "or leave the cache out"
            )
        if settings.zero_stage == 3 and config.stage(stage).is_quantized:
            raise UsageError(
                "lora.quantize does not work with ZeRO-3, which would split packed weights but not their scales: use "
                "zero2, or leave deepspeed out"
            )
        try:
            from anyres_vlm.train.engine.zero import check_zero
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
        from anyres_vlm.train.engine.zero import ZeroBackend

        settings = deepspeed.sized(model.language_model.config.hidden_size)
        if not is_initialized():  # one process without a launcher is a world of its own
            init_process_group(store=HashStore(), rank=0, world_size=1)
            os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads what a launcher would have set
        self._backend = ZeroBackend(model, optimizer, settings, self._accelerator.device, is_main=self.is_main)

    def seed(self, seed: int, step: int) -> None:
        """Seed the random numbers of the next optimizer step on this rank (dropout), on every device."""
        torch.manual_seed(random.Random(f"{seed} {step} {self.rank}").getrandbits(63))

    def step(self, batches: Sequence[Batch], *, stop: bool = False, save: bool = False) -> StepResult:
        """Take one optimizer step over this rank's packs, equal to one big batch over all ranks' samples.

        Every rank passes the same number of packs. The summed loss is divided once, by the supervised tokens of the
        whole step; the factor `world_size` undoes the mean that the gradient exchange takes. `stop` and `save` are
        exchanged with the counts, so that all ranks agree on them without another collective. The host waits for the
        device for the counts, the norm and the loss: never between packs, and only once if it is a single rank's.
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
        supervised, tokens, pairs, tiles, samples, rejects, stops, saves = self.sum(counts).tolist()
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

    def snapshot(self) -> Snapshot:
        """Copy trained weights and optimizer state to rank 0. Called on all ranks together."""
        return self._backend.snapshot()

    def weights(self) -> dict[str, Tensor]:
        """Return the whole model's weights on rank 0, nothing on the others. Called on all ranks together."""
        return self._backend.weights()

    def restore(self, updates: int, read: ReadTensor) -> None:
        """Load a saved optimizer state, on all ranks; `prepare` was given the saved weights."""
        self._backend.restore(updates, read)

    def wait(self) -> None:
        """Wait until every rank has called this."""
        self._accelerator.wait_for_everyone()

    def close(self) -> None:
        """Leave the process group."""
        self._accelerator.end_training()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block on rank 0 before the others, which can then read what it wrote."""
        with self._accelerator.main_process_first():
            yield

    def gather(self, value: Value) -> list[Value]:
        """Return this value of every rank, in the order of the ranks."""
        return cast(list[Value], gather_object([value]))

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks; one rank's stays where it is."""
        if self.world_size == 1:
            return tensor
        return cast(Tensor, self._accelerator.reduce(tensor.to(self._accelerator.device), reduction="sum"))


def _report(batches: Sequence[Batch], losses: Sequence[Tensor]) -> None:
    """Log the samples of the packs whose loss is not finite; of all packs if only the gradient is not."""
    bad = [batch for batch, loss in zip(batches, losses, strict=True) if not math.isfinite(float(loss))]
    for batch in bad or batches:
        what = "loss" if bad else "gradient of the step"
        logger.warning("the %s is not finite; samples of the pack: %s", what, ", ".join(batch.sample_ids))


class Tracker(Protocol):
    """The part of accelerate's trackers that is used."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Record the numbers of an optimizer step."""

    def finish(self) -> None:
        """Send the remaining numbers and close."""


def require_trackers(names: Sequence[str]) -> None:
    """Raise `UsageError` for a tracker that is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise UsageError(f"trackers: {name} is not installed: pip install {name}")


def start_trackers(names: Sequence[str], folder: Path, settings: dict[str, Any]) -> list[Tracker]:
    """Open the run of a stage's folder in each tracker, named by output folder, stage and an id."""
    if not names:
        return []
    id_file = folder / ID_FILE
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(4), encoding="utf-8")
    run = f"{folder.parent.resolve().name}-{folder.name}-{id_file.read_text(encoding='utf-8')}"
    trackers = []
    for name in names:
        identity = {"id": run, "dir": str(folder)} if name == "wandb" else {}
        tracker = LOGGER_TYPE_TO_CLASS[name](PROJECT, name=run, resume="allow", **identity)
        tracker.start()
        tracker.store_init_configuration(settings)
        trackers.append(tracker)
    return trackers
