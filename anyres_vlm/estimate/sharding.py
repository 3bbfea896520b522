"""How a DeepSpeed preset splits a run over its ranks, as far as memory goes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyres_vlm.errors import UsageError
from anyres_vlm.train.engine.deepspeed_settings import find_preset, read_zero

# The shipped presets from the one that moves least between ranks and host to the one that moves most.
PRESETS = (None, "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")


@dataclass(frozen=True)
class Sharding:
    """A preset's figures; sizes are numbers of elements. `stage` 0 is the plain backend: the whole model on a rank."""

    name: str
    stage: int = 0
    offloads_optimizer: bool = False
    offloads_weights: bool = False
    bucket: int = 0
    buckets: int = 0
    prefetch: int = 0
    persistent: int = 0
    live: int = 0
    subgroup: int = 0


def read_sharding(preset: str | None, width: int | None = None) -> Sharding:
    """Read a shipped preset or a JSON file by name, with DeepSpeed's defaults for what it leaves out. None is plain.

    `width`, the language model's hidden size, decides bucket sizes of "auto", as in a run.
    """
    if preset is None:
        return Sharding("none")
    path = find_preset(preset)
    try:
        return _sharding(Path(preset).stem, read_zero(path, width))
    except (AttributeError, OverflowError, TypeError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"--deepspeed {path}: zero_optimization: {error}") from None


def _sharding(name: str, zero: dict[str, Any]) -> Sharding:
    stage = int(zero.get("stage", 0))
    overlaps = zero.get("overlap_comm", stage == 3)
    return Sharding(
        name=name,
        stage=stage,
        offloads_optimizer=_is_offloaded(zero, "offload_optimizer"),
        offloads_weights=_is_offloaded(zero, "offload_param"),
        bucket=int(zero.get("reduce_bucket_size", 5e8)),
        buckets=(1 if stage == 3 else 1 + bool(overlaps)) if zero.get("contiguous_gradients", True) else 0,
        prefetch=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
        persistent=int(zero.get("stage3_param_persistence_threshold", 1e5)),
        live=int(zero.get("stage3_max_live_parameters", 1e9)),
        subgroup=int(zero.get("sub_group_size", 1e9)),
    )


def _is_offloaded(zero: dict[str, Any], part: str) -> bool:
    return bool((zero.get(part) or {}).get("device", "none") != "none")
