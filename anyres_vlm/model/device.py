"""NVIDIA devices that torch was built for but cannot use: without a check, everything would run on the CPU."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

DEVICES = Path("/dev")  # has nvidia0, nvidia1, ... where a device is visible
DRIVER = Path("/proc/driver/nvidia")  # of a loaded kernel module
SHOWS_DEVICES = re.compile(r"\d|GPU-|MIG-")  # at the start of CUDA_VISIBLE_DEVICES; anything else hides all devices


def unusable_gpu() -> tuple[str, str] | None:
    """Return why a CUDA build of torch cannot use the NVIDIA device of this machine, and a remedy.

    None if it can, if there is no device, and if CUDA_VISIBLE_DEVICES hides all devices.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    is_hidden = visible is not None and SHOWS_DEVICES.match(visible) is None
    is_there = any(DEVICES.glob("nvidia[0-9]*")) or DRIVER.is_dir()
    if torch.version.cuda is None or is_hidden or not is_there or torch.cuda.is_available():
        return None
    problem = (
        f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, but cannot use the NVIDIA device of this "
        f"machine (driver {_driver_version()}; {_reason()})"
    )
    remedy = "update the driver or give the container its devices, install a torch build for this driver, or set "
    return problem, remedy + "CUDA_VISIBLE_DEVICES='' to run on the CPU"


def _driver_version() -> str:
    try:
        found = re.search(r"\s(\d+\.[\d.]+)\s", (DRIVER / "version").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return "not loaded"
    return found[1] if found else "of an unknown version"


def _reason() -> str:
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:  # the first line names the cause
        return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return "torch.cuda finds no device"
