"""MFU against the rule of thumb, and peaks by the names that devices give themselves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig

from anyres_vlm.data.packing.cost import forward_flops
from anyres_vlm.train.engine.engine import StepResult
from anyres_vlm.train.metrics import Throughput, device_peak
from anyres_vlm.train.steps import model_flops

LANGUAGE = LlamaConfig(vocab_size=32_064)  # 7B
VISION = CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)
STAGE_2 = ("multi_modal_projector", "image_newline", "language_model")


def step(tokens: int, supervised: int = 0, pairs: int = 0, tiles: int = 0) -> StepResult:
    return StepResult(1.0, 1.0, supervised, tokens, pairs, tiles, 1, 0, False, False)


def mfu(result: StepResult, trained: tuple[str, ...], seconds: float = 1.0, world_size: int = 1) -> float:
    throughput = Throughput(forward_flops(LANGUAGE, VISION), trained, 1e15, world_size)
    return throughput.rates(result, seconds)["time/mfu"]


def test_a_trained_token_costs_six_flops_a_parameter() -> None:
    layers = 32 * (4 * 4096**2 + 3 * 4096 * 11_008)
    assert mfu(step(1000), STAGE_2) == pytest.approx(6 * layers * 1000 / 1e15)
    assert mfu(step(0, supervised=1000), STAGE_2) == pytest.approx(6 * 4096 * 32_064 * 1000 / 1e15)


def test_a_frozen_language_model_still_passes_gradients_on() -> None:
    assert mfu(step(1000), STAGE_2[:2]) == pytest.approx(mfu(step(1000), STAGE_2) * 2 / 3)
    # queries times keys and weights times values, 2 FLOPs a number, forward and twice as much backward
    assert mfu(step(0, pairs=10**6), STAGE_2[:2]) == pytest.approx(3 * 32 * 4 * 4096 * 10**6 / 1e15)


def test_a_tile_is_encoded_forward_alone_unless_the_encoder_is_trained() -> None:
    layer = 2 * (4 * 1024**2 + 2 * 1024 * 4096) * 577 + 4 * 577**2 * 1024
    encoder = 23 * layer + 2 * 576 * 1024 * 3 * 14**2
    projector = 2 * 576 * (1024 + 4096) * 4096
    assert mfu(step(0, tiles=5), STAGE_2) * 1e15 == pytest.approx(5 * (encoder + 3 * projector), rel=1e-6)
    unfrozen = (*STAGE_2, "vision_tower")
    assert mfu(step(0, tiles=5), unfrozen) * 1e15 == pytest.approx(5 * (3 * encoder + 3 * projector), rel=1e-6)


def test_rates_are_a_second_and_mfu_a_device() -> None:
    rates = Throughput(None, STAGE_2, 1e15, 1).rates(step(3000, tiles=9), 2.0)
    assert rates == {"time/tokens_per_s": 1500.0, "time/tiles_per_s": 4.5}
    assert mfu(step(1000), STAGE_2, seconds=2.0, world_size=4) == pytest.approx(mfu(step(1000), STAGE_2) / 8)


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
def test_the_peak_follows_the_device_s_name(monkeypatch: pytest.MonkeyPatch, name: str, tflops: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert device_peak() == (None if tflops is None else pytest.approx(tflops * 1e12))


def test_a_cpu_has_no_known_peak() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert device_peak() is None


def test_a_transformer_of_timm_may_have_any_width() -> None:
    """A ViT-L's 1,024 are no multiple of the heads that transformers assumes."""
    tower = SimpleNamespace(width=2 * 1024, layers=(12, 23), tile=336, patch=14)
    model: Any = SimpleNamespace(vision_tower=tower, language_model=SimpleNamespace(config=LANGUAGE))
    assert model_flops(model) == forward_flops(LANGUAGE, VISION, (12, 23))
