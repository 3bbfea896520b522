"""What a stage trains, how rates move, and the recipe's known mistakes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import get_cosine_schedule_with_warmup

from anyres_vlm.checkpoints.bases import build_model
from anyres_vlm.config import load_config, shipped_config
from anyres_vlm.data.loader import collate
from anyres_vlm.model.lora import add_lora
from anyres_vlm.schema import Batch, ImageRef, Record, Turn
from anyres_vlm.train.recipe import (
    build_optimizer,
    freeze,
    rate_factor,
    recipe_warnings,
    recompute_activations,
    trained_rates,
)


def config(bases: Path, *overrides: str):
    names = [f"model.llm={bases}/llm", f"model.encoder.name={bases}/vit"]
    return load_config(shipped_config("tiny"), [*names, *overrides])


@pytest.mark.parametrize(
    ("stage", "override", "trained"),
    [
        ("stage1", "seed=0", {"multi_modal_projector", "image_newline"}),
        ("stage2", "seed=0", {"multi_modal_projector", "image_newline", "language_model"}),
        (
            "stage2",
            "stage2.vision_lr=2e-6",
            {"multi_modal_projector", "image_newline", "language_model", "vision_tower"},
        ),
        ("stage2", "stage2.lora.rank=2", {"multi_modal_projector", "image_newline", "lora"}),
        ("stage1", "stage1.vision_lr=2e-6", {"multi_modal_projector", "image_newline", "vision_tower"}),
    ],
)
def test_just_the_stage_s_parts_are_trained(tiny_bases, stage, override, trained) -> None:
    run = config(tiny_bases, override)
    model, _ = build_model(run.model, 0)
    if "lora" in trained:
        add_lora(model, run.stage2.lora, seed=0)
    rates = trained_rates(run, stage)
    freeze(model, rates)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {"lora" if ".lora_" in name else name.split(".")[0] for name in names} == trained
    optimizer = build_optimizer(model, rates, weight_decay=0.1)
    held = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    assert held == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert {group["lr"] for group in optimizer.param_groups} == {run.stage(stage).learning_rate} | (
        {2e-6} if "vision_tower" in trained else set()
    )
    assert all(p.ndim > 1 for group in optimizer.param_groups if group["weight_decay"] for p in group["params"])


@pytest.fixture(scope="module")
def batch(tiny_bases, tiny_tokenizer, load_records, tmp_path_factory) -> Batch:
    picture = tmp_path_factory.mktemp("pictures") / "picture.png"
    Image.effect_noise((70, 40), 90).convert("RGB").save(picture)
    turns = (Turn("user", "<image>\nWhat is it?"), Turn("assistant", "a red star"))
    model, tokenizer = build_model(config(tiny_bases).model, 0)
    record = Record("0", (ImageRef("picture", picture),), turns)
    samples = load_records([record], "vicuna_v1", tokenizer, model.tiling)
    return collate(samples, 28, model.image_token_id)


@pytest.mark.parametrize(
    ("stage", "overrides", "varies"),
    [
        ("stage1", [], False),
        ("stage1", ["stage1.vision_lr=1e-6"], True),
        ("stage2", [], True),
        ("stage2", ["stage2.lora.rank=2"], False),
        ("stage2", ["stage2.lora.rank=2", "stage2.lora.dropout=0.5"], True),
        ("stage2", ["stage2.lora.rank=2", "stage2.vision_lr=1e-6"], True),
    ],
    ids=str,
)
def test_dropout_acts_in_trained_parts_alone(tiny_bases, batch, stage, overrides, varies) -> None:
    run = config(tiny_bases, *overrides)
    model, _ = build_model(run.model, 0)
    model.train()
    model.vision_tower.vision_model.encoder.layers[0].self_attn.dropout = 0.5
    for layer in model.language_model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    if run.stage(stage).lora is not None:
        add_lora(model, run.stage(stage).lora, seed=0)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.constant_(parameter, 0.1)
    model.language_model.activation_checkpointing_enable()
    freeze(model, trained_rates(run, stage))
    calls = []
    model.language_model.model.layers[0].mlp.register_forward_pre_hook(lambda *call: calls.append(call))
    first, second = model(batch), model(batch)
    assert (first.item() != second.item()) == varies
    first.backward()
    assert len(calls) == 3, "the backward pass recomputes the layer, in frozen models too"
    assert model.vision_tower(batch.tiles).requires_grad == (run.stage(stage).vision_lr is not None)


@pytest.mark.parametrize(("every", "runs"), [(False, [1, 1]), (True, [2, 2]), (1, [2, 2]), (2, [2, 1]), (9, [2, 1])])
def test_every_nth_layer_is_recomputed(tiny_bases, batch, every, runs) -> None:
    run = config(tiny_bases, f"stage2.activation_checkpointing={str(every).lower()}")
    model, _ = build_model(run.model, 0)
    recompute_activations(model, run.stage2.activation_checkpointing, trained_rates(run, "stage2"))
    freeze(model, trained_rates(run, "stage2"))
    calls = []
    for number, layer in enumerate(model.language_model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *call, number=number: calls.append(number))
    model(batch).backward()
    assert [calls.count(number) for number in range(2)] == runs


def test_the_encoder_moves_at_its_own_rate_up_to_its_deepest_layer(tiny_bases, batch) -> None:
    """The first step of AdamW moves every weight that has a gradient by its rate."""
    run = config(tiny_bases, "stage2.vision_lr=1e-4", "stage2.learning_rate=1e-2", "model.encoder.layer=[1, -3]")
    model, _ = build_model(run.model, 0)
    rates = trained_rates(run, "stage2")
    freeze(model, rates)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = build_optimizer(model, rates, weight_decay=0.0)
    model(batch).backward()
    optimizer.step()
    moved = {name: float((tensor - before[name]).abs().max()) for name, tensor in model.state_dict().items()}
    for name, distance in moved.items():
        if "encoder.layers.1" in name or "encoder.layers.2" in name or "post_layernorm" in name:
            assert distance == 0, name
        elif "k_proj.bias" not in name and "class_embedding" not in name:  # no gradient but rounding's, or none
            rate = 1e-4 if name.startswith("vision_tower.") else 1e-2
            assert distance == pytest.approx(rate, rel=0.02), name


def test_the_schedule_is_that_of_transformers_behind_the_warm_up() -> None:
    total, ratio = 200, 0.03
    warmup = math.ceil(ratio * total)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_cosine_schedule_with_warmup(optimizer, warmup, total).lr_lambdas[0]
    for step in range(warmup, total):
        assert rate_factor(step, total, ratio, floor=0.0) == pytest.approx(theirs(step))
    rising = [rate_factor(step, total, ratio, 0.0) for step in range(warmup + 1)]
    assert rising == sorted(rising)
    assert rising[0] > 0
    assert rising[-1] == 1.0
    assert rate_factor(total, total, ratio, floor=0.1) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["stage1.learning_rate=1e-3", "stage2.learning_rate=1e-3"], "both stages use learning_rate=0.001"),
        (["stage2.epochs=3"], "runs 3 epochs"),
        (["model.grid=1x1"], "only the thumbnail"),
    ],
)
def test_known_mistakes_are_said(tiny_bases, overrides, words) -> None:
    assert any(words in warning for warning in recipe_warnings(config(tiny_bases, *overrides), "stage2"))
    assert recipe_warnings(config(tiny_bases), "stage2") == []
