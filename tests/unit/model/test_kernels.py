"""Kernels are refused where they cannot run, leave the loss to this package, and compute what transformers computes."""

from __future__ import annotations

import sys
from copy import deepcopy
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, LlamaConfig, PreTrainedModel

from anyres_vlm.errors import UsageError
from anyres_vlm.model.kernels import Kernels, apply_kernels, require_kernels


def small_llama() -> PreTrainedModel:
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**shape, num_hidden_layers=2, vocab_size=100))


def test_what_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for kernels in ("none", "compile"):
        require_kernels(kernels)
    require_kernels("compile", zero_stage=2)
    with pytest.raises(UsageError, match="kernels=compile does not work with ZeRO-3"):
        require_kernels("compile", zero_stage=3)
    monkeypatch.setattr("anyres_vlm.model.kernels.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'anyres-vlm\[liger\]'"):
        require_kernels("liger")
    monkeypatch.setattr("anyres_vlm.model.kernels.find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="kernels=liger needs a CUDA device"):
        require_kernels("liger")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    require_kernels("liger")


def test_liger_replaces_layers_and_not_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    liger = ModuleType("liger_kernel.transformers.monkey_patch")
    liger.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": lambda **given: calls.append(given)}
    for name in ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.monkey_patch"):
        monkeypatch.setitem(sys.modules, name, liger)
    model = small_llama()
    apply_kernels(model, "liger")
    assert calls == [{"model": model, "cross_entropy": False, "fused_linear_cross_entropy": False}]
    bloom = AutoModelForCausalLM.from_config(BloomConfig(hidden_size=8, n_layer=1, n_head=1, vocab_size=9))
    with pytest.raises(UsageError, match="no kernels for models of type bloom"):
        apply_kernels(bloom, "liger")


@pytest.mark.parametrize(
    "kernels",
    [
        pytest.param("compile", marks=pytest.mark.slow),
        pytest.param("liger", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
    ],
)
def test_kernels_compute_the_same(monkeypatch: pytest.MonkeyPatch, kernels: Kernels) -> None:
    from transformers.models.llama import modeling_llama

    if kernels == "liger":
        pytest.importorskip("liger_kernel")
    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))  # restored after the test
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain = small_llama().to(device)
    fast = deepcopy(plain)
    names = [name for name, _ in plain.named_parameters()]
    results = []
    for model in (plain, fast):
        if model is fast:
            apply_kernels(model, kernels)
        losses = []
        for length in (7, 12, 31):  # lengths vary
            logits = model(torch.arange(length, device=device)[None]).logits
            losses.append(logits.float().square().mean())
        torch.stack(losses).sum().backward()
        results.append((torch.stack(losses), [parameter.grad for parameter in model.parameters()]))
    assert [name for name, _ in fast.named_parameters()] == names
    torch.testing.assert_close(*(losses for losses, _ in results), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(*(gradients for _, gradients in results), rtol=1e-3, atol=1e-5)
