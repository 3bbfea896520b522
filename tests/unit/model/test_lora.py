"""Adapters start as the identity, merge exactly and have peft's format; peft's wrapper is the oracle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from anyres_vlm.checkpoints.bases import build_model
from anyres_vlm.checkpoints.load_save import load_pretrained, save_pretrained
from anyres_vlm.config import LoraSettings, ModelConfig
from anyres_vlm.errors import UsageError
from anyres_vlm.model.lora import add_lora, merged_weights, save_adapter
from anyres_vlm.model.vlm import VisionLanguageModel

MERGED_ATOL = 2e-5  # of logits; worst of 5 seeds in fp32 on CPU: 6e-6
SETTINGS = LoraSettings(rank=4, alpha=12)
IDS = torch.tensor([[1, 40, 41, 42, 9, 70, 2]])


def build(bases: Path) -> tuple[VisionLanguageModel, PreTrainedTokenizerFast]:
    config = {"llm": str(bases / "llm"), "encoder": {"name": str(bases / "vit")}, "template": "vicuna_v1"}
    return build_model(ModelConfig.model_validate(config), seed=0)


def adapted(bases: Path, settings: LoraSettings = SETTINGS, seed: int = 0) -> VisionLanguageModel:
    """Return a model with adapters as after training, with B not zero."""
    model, _ = build(bases)
    add_lora(model, settings, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.2, generator=generator)
    return model.eval()


@torch.inference_mode()
def logits(model: VisionLanguageModel) -> Tensor:
    return model.language_model(inputs_embeds=model.language_model.get_input_embeddings()(IDS)).logits


def test_fresh_adapters_change_nothing_and_come_from_the_seed(tiny_bases: Path) -> None:
    plain, _ = build(tiny_bases)
    before = plain.state_dict()
    states = []
    for seed in (3, 3, 4):
        model, _ = build(tiny_bases)
        torch.manual_seed(len(states))
        add_lora(model, SETTINGS, seed)
        assert torch.equal(logits(model.eval()), logits(plain.eval()))
        states.append(model.state_dict())
        merged = merged_weights(states[-1], SETTINGS)
        assert list(merged) == list(before)
        assert all(torch.equal(merged[name], tensor) for name, tensor in before.items())
    first, again, other = ([t for name, t in state.items() if ".lora_A." in name] for state in states)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    ("targets", "parameters"),
    [
        # width 48, keys and values 24, MLP 64, 2 layers, rank 4
        (None, 2 * 4 * (2 * (48 + 48) + 2 * (48 + 24) + 3 * (48 + 64))),
        (("q_proj", "v_proj"), 2 * 4 * ((48 + 48) + (48 + 24))),
    ],
)
def test_merged_saved_and_loaded_by_peft_is_the_same_function(
    tiny_bases: Path, tmp_path: Path, targets: tuple[str, ...] | None, parameters: int
) -> None:
    settings = LoraSettings(rank=4, alpha=12, target_modules=targets)
    _, tokenizer = build(tiny_bases)
    for seed in range(5):
        folder = tmp_path / str(seed)
        folder.mkdir()
        model = adapted(tiny_bases, settings, seed)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert sum(tensor.numel() for name, tensor in state.items() if ".lora_" in name) == parameters
        expected = logits(model)
        plain = logits(build(tiny_bases)[0].eval())
        assert (expected - plain).abs().max() > 1

        save_adapter(model, state, folder)
        save_pretrained(model, merged_weights(state, settings), tokenizer, "", folder)
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        merged, _ = load_pretrained(folder)
        torch.testing.assert_close(logits(merged.eval()), expected, atol=MERGED_ATOL, rtol=0)

        base = AutoModelForCausalLM.from_pretrained(tiny_bases / "llm")
        theirs = PeftModel.from_pretrained(base, folder / "adapter").eval()
        with torch.inference_mode():
            torch.testing.assert_close(theirs(IDS).logits, expected, atol=MERGED_ATOL, rtol=0)
            merged_by_peft = theirs.merge_and_unload()
        for name, tensor in merged_by_peft.state_dict().items():
            torch.testing.assert_close(merged.state_dict()[f"language_model.{name}"], tensor, atol=1e-7, rtol=0)


@pytest.mark.parametrize("targets", [("lm_head",), ("q_proj", "query"), ("embed_tokens",), ("input_layernorm",)])
def test_targets_that_are_not_linear_layers_of_the_decoder(tiny_bases: Path, targets: tuple[str, ...]) -> None:
    model, _ = build(tiny_bases)
    with pytest.raises(UsageError, match=rf"which are down_proj, .*v_proj; got {targets[-1]}$"):
        add_lora(model, LoraSettings(target_modules=targets), seed=0)


def test_alpha_follows_the_rank_unless_it_is_set() -> None:
    assert LoraSettings() == LoraSettings(rank=128, alpha=256)
    assert LoraSettings(rank=8).alpha == 16
    assert LoraSettings(rank=8, alpha=256).alpha == 256
    assert LoraSettings(rank=8).model_dump()["alpha"] == 16
