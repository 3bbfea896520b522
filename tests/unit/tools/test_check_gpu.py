"""The part of `tools/check/gpu` that takes a CPU seconds: it passes, and fails where documents see each other."""

from __future__ import annotations

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


def above(gpu: Any, figures: dict[str, float]) -> set[str]:
    return {name for name, limit in gpu.LIMITS["attention"].items() if not figures[name] <= limit}


def test_attention_passes(gpu: Any) -> None:
    assert above(gpu, gpu.attention("cpu")) == set()


def test_documents_that_see_each_other_are_noticed(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(inputs: Any, lengths: Any) -> Any:
        return F.scaled_dot_product_attention(*inputs, enable_gqa=True).transpose(1, 2)

    monkeypatch.setattr(gpu, "attend", attend)
    assert above(gpu, gpu.attention("cpu")) == {"forward", "gradient", "leak"}
