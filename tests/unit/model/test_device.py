"""A GPU that a CUDA build of torch cannot use is an error of training, not a reason to train on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from anyres_vlm.errors import UsageError
from anyres_vlm.model import device
from anyres_vlm.preflight.machine import check_accelerator
from anyres_vlm.train.engine.engine import Engine

VERSION = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  450.80.02  Wed Sep 23 01:13:39 UTC 2020\nGCC version: 9.3.0\n"
)
TOO_OLD = "The NVIDIA driver on your system is too old (found version 11000). Update it.\nMore lines."


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a CUDA build of torch, a driver that is too old, and one device."""
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidia0").touch()
    (tmp_path / "driver").mkdir()
    (tmp_path / "driver" / "version").write_text(VERSION)
    monkeypatch.setattr(device, "DEVICES", tmp_path / "dev")
    monkeypatch.setattr(device, "DRIVER", tmp_path / "driver")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", fail_as_torch_does)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def fail_as_torch_does() -> None:
    raise RuntimeError(TOO_OLD)


def remove(machine: Path, *names: str) -> None:
    for name in names:
        path = machine / name
        path.unlink() if path.is_file() else path.rmdir()


@pytest.mark.parametrize("visible", [None, "0", "1,0", "GPU-8932f937", "MIG-GPU-8932f937/1/2"])
def test_training_is_refused(monkeypatch: pytest.MonkeyPatch, visible: str | None) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    expected = (
        r"is built for CUDA 13\.0, but .*driver 450\.80\.02; .*too old.*\): update .*CUDA_VISIBLE_DEVICES='' to run"
    )
    with pytest.raises(UsageError, match=expected) as raised:
        Engine.start("fp32", 1)
    assert "\n" not in str(raised.value)
    (finding,) = check_accelerator(None)
    assert (finding.level, "450.80.02" in finding.found) == ("fail", True)


@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles"])
def test_hidden_devices_are_a_choice(monkeypatch: pytest.MonkeyPatch, visible: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert device.unusable_gpu() is None


@pytest.mark.parametrize(
    ("missing", "version"),
    [
        (("driver/version", "driver"), "not loaded"),
        (("dev/nvidia0", "driver/version"), "not loaded"),
        ((), "450.80.02"),
    ],
)
def test_one_sign_of_a_device_is_enough(machine: Path, missing: tuple[str, ...], version: str) -> None:
    remove(machine, *missing)
    fault = device.unusable_gpu()
    assert fault is not None
    assert f"(driver {version}; " in fault[0]


def test_machines_and_builds_without_cuda_train_on_the_cpu(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert device.unusable_gpu() is None
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert device.unusable_gpu() is not None
    remove(machine, "dev/nvidia0", "driver/version", "driver")
    assert device.unusable_gpu() is None
