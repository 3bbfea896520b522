"""How the ranks of a run find one another under `srun` and report the loss of one; trials of what they need."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import TCPStore
from torch.distributed import DistError

from anyres_vlm.errors import RankLost
from anyres_vlm.model.vlm import VisionLanguageModel
from anyres_vlm.schema import Batch
from anyres_vlm.train.engine.deepspeed_settings import DeepSpeedSettings

FIRST_PORT, PORTS = 20_000, 10_000  # below the ports that Linux assigns by itself
PATIENCE = timedelta(seconds=60)  # of a trial
GLOO = re.compile(r"/gloo/")  # raises RuntimeError with messages that start with its source file


def adopt_slurm_ranks() -> None:
    """Set RANK and what goes with it from `srun`'s variables, unless a launcher or the user has set RANK.

    A process in a batch script, without `srun`, is not a rank.
    """
    if "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return
    for name, value in slurm_ranks(os.environ).items():
        os.environ.setdefault(name, value)


def slurm_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """Return rank, world size and the first node's address under the names that torch reads.

    The port follows from job and step, so that jobs that share a node use different ones.
    """
    job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "MASTER_ADDR": first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(FIRST_PORT + (10 * job + step) % PORTS),
    }


def first_host(hosts: str) -> str:
    """Return the first host of Slurm's compact lists: `gpu[007-010,12],cpu1` -> `gpu007`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", hosts)
    assert first is not None, "srun names its nodes"
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])


@contextmanager
def telling_lost_ranks(timeout_minutes: float) -> Iterator[None]:
    """Raise `RankLost` if the block fails because another rank has ended, or did not answer in time."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, DistError) and GLOO.search(str(error)) is None:
            raise
        reason = " ".join(str(error).split())
        raise RankLost(
            f"another rank has ended, or did not answer for rank_timeout_minutes={timeout_minutes:g}: see its last "
            f"output; rerun the same command to resume from the newest checkpoint ({reason})"
        ) from error


def open_group(backend: Literal["gloo", "nccl"], device: torch.device) -> float:
    """Open a group of this process alone, over TCP, and sum in it. Returns seconds. Raises `RuntimeError`."""
    began = time.perf_counter()
    with _group(backend):
        ones = torch.ones(4, device=device)
        dist.all_reduce(ones)
        if ones.tolist() != [1.0] * 4:
            raise RuntimeError(f"{backend} summed four ones of one process to {ones.tolist()}")
    return time.perf_counter() - began


def try_presets(presets: Sequence[DeepSpeedSettings], *, bf16: bool) -> str:
    """Take one optimizer step of a small layer under each preset. Returns the name of DeepSpeed's accelerator.

    Raises `ImportError` without DeepSpeed, `UsageError` for settings that are not DeepSpeed's, `RuntimeError` for a
    step that is not finite, and what DeepSpeed raises.
    """
    has_device = torch.accelerator.is_available()
    if not has_device:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # as the engine does
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads what a launcher would have set
    from deepspeed.accelerator import get_accelerator  # optional: the extra `deepspeed`

    from anyres_vlm.train.engine.zero import ZeroBackend, check_zero

    device = torch.device(str(torch.accelerator.current_accelerator()) if has_device else "cpu")
    number = torch.ones(1, 8, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    with _group("nccl" if torch.cuda.is_available() else "gloo"):  # one group for all: DeepSpeed keeps the first
        for preset in presets:
            check_zero(preset)
            layer = _Layer()
            settings = preset.sized(layer.in_features)
            settings["zero_optimization"].pop("zero_hpz_partition_size", None)  # of many ranks
            optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
            backend = ZeroBackend(cast(VisionLanguageModel, layer), optimizer, settings, device, is_main=True)
            backend.micro_step(cast(Batch, number), 1.0, is_last=True)
            if not math.isfinite(norm := backend.update()):
                raise RuntimeError(f"a step under {preset.path.stem} has a gradient norm of {norm}")
    return str(get_accelerator().device_name())


class _Layer(nn.Linear):
    """Stands in for the model: its forward is a loss."""

    cached_features = None

    def __init__(self) -> None:
        super().__init__(8, 8)

    def forward(self, numbers: Tensor) -> Tensor:
        return super().forward(numbers).float().square().sum()


@contextmanager
def _group(backend: Literal["gloo", "nccl"]) -> Iterator[None]:
    store = TCPStore("127.0.0.1", 0, 1, is_master=True, timeout=PATIENCE)
    dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()
