"""What many ranks need, tried in one process: a group that sums, and a step under a DeepSpeed preset."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import TCPStore

from anyres_vlm.model.vlm import VisionLanguageModel
from anyres_vlm.schema import Batch
from anyres_vlm.train.engine.deepspeed_settings import DeepSpeedSettings

PATIENCE = timedelta(seconds=60)


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
    """One optimizer step of a small layer under each preset. Returns the name of DeepSpeed's accelerator.

    Raises `ImportError` without DeepSpeed, `UsageError` for settings that are not DeepSpeed's, `RuntimeError` for a
    step that is not finite, and what DeepSpeed raises.
    """
    has_device = torch.accelerator.is_available()
    if not has_device:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # as the engine does
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for what a launcher would have set
    from deepspeed.accelerator import get_accelerator  # optional: the extra `deepspeed`

    from anyres_vlm.train.engine.zero import ZeroBackend, check_zero

    device = torch.device(str(torch.accelerator.current_accelerator()) if has_device else "cpu")
    number = torch.ones(1, 8, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    with _group("nccl" if torch.cuda.is_available() else "gloo"):  # one for all: DeepSpeed keeps the first
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
    """Stands for the model: its forward is a loss."""

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
