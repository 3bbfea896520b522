"""Checks of the machine: Python, packages and devices, and the findings that all checks report.

Libraries are imported inside the checks: a broken library is a finding and must not stop the other checks.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from itertools import pairwise
from typing import Literal, TypeVar

DISTRIBUTION = "anyres-vlm"
ATTENTION_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}  # bf16 has 8 bits: 2^-8 of values up to 3
VARLEN, PER_DOCUMENT = "torch's FlashAttention varlen", "SDPA, document by document"
Level = Literal["ok", "warn", "fail"]
Subject = TypeVar("Subject")
# Exceptions of broken installations, drivers, disks and data; the errors of this package are subclasses.
BROKEN = (ImportError, OSError, RuntimeError, ValueError, AttributeError)


@dataclass(frozen=True)
class Finding:
    """One line of the report; `remedy` is empty if there is nothing to do."""

    check: str
    level: Level
    found: str
    remedy: str = ""


def judge(check: str, is_good: bool, found: str, remedy: str) -> Finding:
    """Return a finding of level ok or fail."""
    return Finding(check, "ok", found) if is_good else Finding(check, "fail", found, remedy)


def run_checks(checks: Mapping[str, Callable[[Subject], Iterable[Finding]]], subject: Subject) -> Iterator[Finding]:
    """Yield the findings of all checks in order; a check that raises is itself a finding."""
    for name, check in checks.items():
        try:
            yield from check(subject)
        except BROKEN as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            yield Finding(name, "fail", reason, "" if isinstance(error, ValueError) else f"fix this first ({name})")


def gigabytes(size: float) -> str:
    """Format a number of bytes as GB (10^9 bytes) or MB."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"


def check_python(_: None) -> Iterator[Finding]:
    """Check that the interpreter is a 64-bit one."""
    bits = 64 if sys.maxsize > 2**32 else 32
    words = f"{platform.python_version()}, {bits} bits, {sys.executable}"
    yield judge("python", bits == 64, words, "install a 64-bit Python: torch supports no other")


def check_packages(_: None) -> Iterator[Finding]:
    """Check that every required package is installed in an allowed version."""
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(line) for line in requires(DISTRIBUTION) or ()]
    except PackageNotFoundError:
        yield Finding("packages", "warn", f"{DISTRIBUTION} runs from a folder and is not installed", "pip install -e .")
        return
    required = [one for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]
    wrong = {}
    for one in required:
        try:
            if not one.specifier.contains(installed := version(one.name), prereleases=True):
                wrong[f"{one.name}{one.specifier}"] = f"{one.name} {installed}"
        except PackageNotFoundError:
            wrong[f"{one.name}{one.specifier}"] = f"no {one.name}"
    words = ", ".join(wrong.values()) or f"all {len(required)} required packages have allowed versions"
    yield judge("packages", not wrong, words, "pip install " + " ".join(f"'{name}'" for name in wrong))


def check_torch(_: None) -> Iterator[Finding]:
    """Check that torch is built for CUDA if the machine has an NVIDIA driver."""
    import torch

    builds = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    build = " ".join(f"{name} {number}" for name, number in builds.items() if number)
    words = f"{torch.__version__}, built for {build or 'CPU only'}, {torch.get_num_threads()} threads"
    has_driver = shutil.which("nvidia-smi") is not None
    remedy = "an NVIDIA driver is installed: pip install a CUDA build of torch"
    yield judge("torch", bool(build) or not has_driver, words, remedy)


def check_accelerator(_: None) -> Iterator[Finding]:
    """Compare a bf16 matrix product on each device with the CPU's."""
    import torch

    if not torch.accelerator.is_available():
        yield _no_accelerator()
        return
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    factor = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    for number in range(torch.accelerator.device_count()):
        device = torch.device(kind.type, number)
        product = (factor.to(device) @ factor.to(device)).float().cpu()
        is_right = torch.allclose(product, factor.float() @ factor.float(), rtol=2e-2, atol=2e-1)
        finding = judge("accelerator", is_right, str(device), "wrong matrix product: try another driver or device")
        if is_right and kind.type == "cuda":
            finding = _cuda_device(number)
        yield finding


def _cuda_device(number: int) -> Finding:
    import torch

    from anyres_vlm.model.attention import has_bf16

    facts = torch.cuda.get_device_properties(number)
    free, total = torch.cuda.mem_get_info(number)
    words = f"cuda:{number} {facts.name}, {gigabytes(free)} of {gigabytes(total)} free"
    if not has_bf16(torch.device("cuda", number)):
        return Finding("accelerator", "warn", f"{words}, no bf16", "set precision: fp32, or use an Ampere GPU or later")
    if free < total / 2:
        return Finding("accelerator", "warn", words, "another process uses its memory: nvidia-smi shows which")
    return Finding("accelerator", "ok", words)


def _no_accelerator() -> Finding:
    import torch

    from anyres_vlm.model.device import unusable_gpu

    words = f"none; {os.cpu_count()} CPU cores"
    if (fault := unusable_gpu()) is not None:
        problem, remedy = fault
        return Finding("accelerator", "fail", f"{words}; {problem}", remedy)
    if torch.version.cuda and shutil.which("nvidia-smi"):
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        remedy = f"CUDA_VISIBLE_DEVICES={hidden!r} hides it: unset it" if hidden is not None else "update the driver"
        return Finding("accelerator", "fail", f"{words}, but an NVIDIA driver is installed", remedy)
    return Finding("accelerator", "ok", f"{words}: enough for the embedded default, too slow for large models")


def check_attention(_: None) -> Iterator[Finding]:
    """Check that attention on this device keeps the documents of a pack apart, and report the kernel."""
    import torch
    import torch.nn.functional as F

    from anyres_vlm.model.attention import Documents, has_bf16, packed_attention, varlen_obstacle

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" and has_bf16(device) else torch.float32
    generator, ends = torch.Generator().manual_seed(0), [0, 5, 17]
    q, k, v = (torch.randn(1, 4, ends[-1], 64, generator=generator).to(device, dtype) for _ in range(3))
    lengths = [end - start for start, end in pairwise(ends)]
    documents = Documents(torch.tensor(ends, dtype=torch.int32, device=device), lengths)
    packed, _ = packed_attention(torch.nn.Module(), q, k, v, None, documents=documents)
    separate = []
    for start, end in pairwise(ends):
        one, two, three = (x[:, :, start:end].float() for x in (q, k, v))
        separate.append(F.scaled_dot_product_attention(one, two, three, is_causal=True))
    error = float((packed.float().transpose(1, 2) - torch.cat(separate, dim=2)).abs().max())
    obstacle = varlen_obstacle(device, dtype, {q.shape[-1]}, 0.0)
    kernel = VARLEN if obstacle is None else PER_DOCUMENT
    words = f"{kernel}; differs by {error:.0e} from attention over each document separately"
    if find_spec("flash_attn"):
        words += "; the flash-attn package is not used"
    tolerance = ATTENTION_TOLERANCE[str(dtype).removeprefix("torch.")]
    yield judge("attention", error < tolerance, words, f"expected < {tolerance:.0e}: install another torch release")


def check_groups(_: None) -> Iterator[Finding]:
    """Open a process group of one rank with each communication library."""
    import torch

    from anyres_vlm.train.engine.ranks import open_group

    if torch.distributed.is_gloo_available():
        seconds = open_group("gloo", torch.device("cpu"))
        yield Finding("gloo", "ok", f"all-reduce in a group of one process took {seconds:.2f} s")
    else:
        yield Finding("gloo", "fail", "torch is built without it", "install torch from its official wheels")
    if not torch.cuda.is_available():
        yield Finding("nccl", "ok", "not needed: no CUDA device")
    elif torch.distributed.is_nccl_available():
        seconds = open_group("nccl", torch.device("cuda", 0))
        yield Finding("nccl", "ok", f"all-reduce in a group of one process took {seconds:.2f} s")
    else:
        yield Finding("nccl", "fail", "torch is built without it", "several GPUs need a CUDA build of torch on Linux")


CHECKS: dict[str, Callable[[None], Iterable[Finding]]] = {
    "python": check_python,
    "packages": check_packages,
    "torch": check_torch,
    "accelerator": check_accelerator,
    "attention": check_attention,
    "gloo, nccl": check_groups,
}
