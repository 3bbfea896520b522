"""Rates and MFU of a step worked out by hand, and the peak of a device by the name that its driver reports."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig

from anyres_vlm.data.packing.cost import Flops, forward_flops
from anyres_vlm.train.engine.engine import StepResult
from anyres_vlm.train.metrics import Throughput, device_peak
from anyres_vlm.train.steps import model_flops

STEP = StepResult(
    loss=1.0, grad_norm=1.0, supervised_tokens=100, tokens=3000, pairs=10**6, tiles=10, samples=1, rejects=0,
    stop=False, save=False,
)  # fmt: skip


def test_rates_and_mfu_of_four_devices() -> None:
    """FLOPs: 2 x (3000 x 1e6 + 100 x 5e6) + 3 x 1e6 x 1e3 + 10 x (1e8 + 3 x 1e7) = 11.3e9, over 2 s x 4 x 1e9."""
    flops = Flops(token=1e6, head=5e6, pair=1e3, encoder=1e8, projector=1e7)
    rates = Throughput(flops, ("multi_modal_projector", "image_newline"), peak=1e9, world_size=4).rates(STEP, 2.0)
    assert rates == {"time/tokens_per_s": 1500.0, "time/tiles_per_s": 5.0, "time/mfu": pytest.approx(11.3 / 8)}


def test_a_device_of_unknown_peak_has_no_mfu() -> None:
    rates = Throughput(Flops(1, 1, 1, 1, 1), (), peak=None, world_size=1).rates(STEP, 2.0)
    assert rates == {"time/tokens_per_s": 1500.0, "time/tiles_per_s": 5.0}


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A1000", None),
        ("NVIDIA L40", None),
    ],
)
def test_the_peak_follows_the_name_of_the_device(
    monkeypatch: pytest.MonkeyPatch, name: str, tflops: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert device_peak() == (None if tflops is None else pytest.approx(tflops * 1e12))


def test_a_cpu_has_no_known_peak() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert device_peak() is None


def test_a_transformer_of_timm_may_have_any_width() -> None:
    """A ViT-L's 1,024 are no multiple of the heads that transformers assumes."""
    language = LlamaConfig(vocab_size=32_064)  # 7B
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    tower = SimpleNamespace(width=2 * 1024, layers=(12, 23), tile=336, patch=14)
    model: Any = SimpleNamespace(vision_tower=tower, language_model=SimpleNamespace(config=language))
    assert model_flops(model) == forward_flops(language, vision, (12, 23))
