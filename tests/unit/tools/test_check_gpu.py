"""The checks of `tools/check/gpu` that take seconds on a CPU: they run, pass, and fail if documents see each other."""

from __future__ import annotations

import json
import os
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F

SCRIPT = Path(__file__).parents[3] / "tools" / "check" / "gpu"


@pytest.fixture(scope="module")
def gpu() -> Any:
    loader = SourceFileLoader("check_gpu", str(SCRIPT))
    spec = spec_from_loader("check_gpu", loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what `main` sets."""
    for name in ("NVIDIA_TF32_OVERRIDE", "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, os.environ.get(name, {"DS_ACCELERATOR": "cpu"}.get(name, "")))
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--only", "attention"])


def test_attention_passes(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The check itself runs in a process of its own, as it does for users."""
    assert gpu.main() == 0
    report = json.loads(capsys.readouterr().out)
    assert report["checks"]["attention"]["limits"].keys() == {"forward", "gradient", "leak"}


def test_documents_that_see_each_other_fail(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def attend(inputs: Any, lengths: Any) -> Any:
        return F.scaled_dot_product_attention(*inputs, is_causal=False, enable_gqa=True).transpose(1, 2)

    monkeypatch.setattr(gpu, "attend", attend)
    monkeypatch.setattr(gpu, "judge", lambda name, device: gpu.verdict(name, device, gpu.CHECKS[name](device)))
    assert gpu.main() == 1
    failed = json.loads(capsys.readouterr().out)["checks"]["attention"]["failed"]
    assert [words.partition(" is ")[0] for words in failed.split("; ")] == ["forward", "gradient", "leak"]


@pytest.mark.slow
def test_a_step_of_every_way_of_training(gpu: Any) -> None:
    """Regression: no test ran the script, and it named functions that no longer existed."""
    found = gpu.judge("kernels", "cpu")
    assert found.get("figures") == {f"varlen calls, {way}": 0 for way in ("plain", "LoRA", "QLoRA", "zero2")}, found
