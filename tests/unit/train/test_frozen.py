"""Frozen matrices in bf16 and checkpointed encoders give the losses and gradients of fp32 weights, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from anyres_vlm.checkpoints.bases import build_model
from anyres_vlm.config import RunConfig, load_config, shipped_config
from anyres_vlm.data.loader import collate
from anyres_vlm.model.encoder import TimmEncoder
from anyres_vlm.model.lora import add_lora
from anyres_vlm.model.vlm import VisionLanguageModel
from anyres_vlm.schema import Batch, ImageRef, Record, Turn
from anyres_vlm.train.recipe import freeze, frozen_matrices, recompute_activations, trained_rates


def config(bases: Path, *more: str) -> RunConfig:
    return load_config(
        shipped_config("tiny"), [f"model.llm={bases}/llm", f"model.encoder.name={bases}/vit", "precision=bf16", *more]
    )


def build(run: RunConfig, stage: str, *, timm_encoder: bool = False, tied: bool = False) -> VisionLanguageModel:
    model, _ = build_model(run.model, 0)
    if timm_encoder:
        torch.manual_seed(0)
        options = {"img_size": 28, "patch_size": 14, "embed_dim": 32, "depth": 3, "num_heads": 2}
        network = timm.create_model("vit_tiny_patch16_224", num_classes=0, **options)
        model.vision_tower = TimmEncoder(network, -2, [0.5] * 3, [0.5] * 3)
    if tied:
        model.language_model.config.tie_word_embeddings = True
        model.language_model.lm_head.weight = model.language_model.model.embed_tokens.weight
    if run.stage(stage).lora is not None:
        add_lora(model, run.stage(stage).lora, seed=0)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    recompute_activations(model, run.stage(stage).activation_checkpointing, trained_rates(run, stage))
    freeze(model, trained_rates(run, stage))
    return model


@pytest.fixture(scope="module")
def batch(tiny_bases, load_records, tmp_path_factory) -> Batch:
    picture = tmp_path_factory.mktemp("pictures") / "picture.png"
    Image.effect_noise((70, 40), 90).convert("RGB").save(picture)
    turns = (Turn("user", "<image>\nWhat is it?"), Turn("assistant", "a red star"))
    model, tokenizer = build_model(config(tiny_bases).model, 0)
    records = [Record(str(n), (ImageRef("picture", picture),), turns) for n in range(2)]
    return collate(load_records(records, "vicuna_v1", tokenizer, model.tiling), 28, model.image_token_id)


def gradients(model: VisionLanguageModel, batch: Batch) -> dict[str, Tensor]:
    """Return the loss and all gradients of a pass under autocast, as the plain backend runs it."""
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(batch)
    loss.backward()
    found = {name: part.grad for name, part in model.named_parameters() if part.grad is not None}
    model.zero_grad()
    return {"loss": loss.detach(), **found}


CASES = [
    ("stage1", [], {}),
    ("stage1", [], {"tied": True}),
    ("stage1", ["stage1.activation_checkpointing=true"], {"timm_encoder": True}),
    ("stage2", [], {}),
    ("stage2", ["stage2.lora.rank=4"], {}),
    ("stage2", ["stage2.lora={rank: 4, target_modules: [q_proj]}"], {"tied": True}),
    ("stage2", ["stage2.vision_lr=1e-5", "model.encoder.layer=[1,-3]"], {}),
]


@pytest.mark.parametrize(("stage", "more", "options"), CASES, ids=str)
def test_frozen_matrices_in_bf16_change_no_bit(tiny_bases, batch, stage, more, options) -> None:
    model = build(config(tiny_bases, *more), stage, **options)
    expected = gradients(model, batch)
    before = {name: parameter.dtype for name, parameter in model.named_parameters()}
    matrices = list(frozen_matrices(model))
    for weight in matrices:
        weight.data = weight.data.bfloat16()
    found = gradients(model, batch)
    assert found.keys() == expected.keys()
    assert all(found[name].dtype == tensor.dtype for name, tensor in expected.items())
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    halved = {name for name, parameter in model.named_parameters() if parameter.dtype != before[name]}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert halved <= frozen
    assert any("vision_tower" in name for name in halved)
    assert any("language_model" in name for name in halved) == (stage == "stage1" or "lora" in str(more))
    assert not any("embed_tokens" in name or "norm" in name for name in halved)
    assert ("language_model.lm_head.weight" in halved) == ("language_model" in str(halved) and "tied" not in options)


@pytest.mark.parametrize("timm_encoder", [False, True])
@pytest.mark.parametrize("rate", ["1e-5", "null"])
def test_a_trained_encoder_is_checkpointed(tiny_bases, batch, timm_encoder: bool, rate: str) -> None:
    calls: list[nn.Module] = []
    results = []
    for recomputes in ("true", "false"):
        settings = [f"stage2.vision_lr={rate}", f"stage2.activation_checkpointing={recomputes}"]
        model = build(config(tiny_bases, *settings), "stage2", timm_encoder=timm_encoder)
        network = model.vision_tower.vision_model
        block = network.blocks[0].mlp if timm_encoder else network.encoder.layers[0].mlp
        block.register_forward_pre_hook(lambda module, _: calls.append(module))
        results.append(gradients(model, batch))
        results[-1]["calls"] = torch.tensor(len(calls))
        calls.clear()
    recomputed, kept = results
    assert (recomputed.pop("calls"), kept.pop("calls")) == ((2, 1) if rate != "null" else (1, 1))
    assert any("vision_tower" in name for name in kept) == (rate != "null")
    assert all(torch.equal(recomputed[name], tensor) for name, tensor in kept.items())
