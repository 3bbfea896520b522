"""The accelerators that a run can be planned for."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from anyres_vlm.errors import UsageError
from anyres_vlm.train.metrics import PEAKS

GB = 1e9
# What a name is called in `PEAKS`, and the memory in GB (10^9 bytes) that the maker states.
MEMORY = {
    "a100-40gb": ("A100", 40), "a100-80gb": ("A100", 80), "a10g-24gb": ("A10G", 24), "l4-24gb": ("L4", 24),
    "l40s-48gb": ("L40S", 48), "rtx4090-24gb": ("RTX 4090", 24), "h100-80gb": ("H100", 80), "h800-80gb": ("H800", 80),
    "h200-141gb": ("H200", 141), "mi300x-192gb": ("MI300X", 192), "b200-180gb": ("B200", 180),
}  # fmt: skip


@dataclass(frozen=True)
class Device:
    """`memory` in bytes; `peak` in dense bf16 FLOP/s, as for the MFU that training reports."""

    name: str
    memory: float
    peak: float


def find_device(name: str) -> Device:
    """A device by its name. Raises `UsageError` with the nearest one for a name that is none."""
    known = MEMORY.get(name.lower())
    if known is None:
        near = difflib.get_close_matches(name.lower(), MEMORY, n=1)
        raise UsageError(
            f"--device {name}: "
            + (f"did you mean {near[0]}? " if near else "")
            + f"known are {', '.join(sorted(MEMORY))}"
        )
    model, memory = known
    return Device(name.lower(), memory * GB, PEAKS[model] * 1e12)
