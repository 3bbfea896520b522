"""What a stage trains, how rates move, and the recipe's known mistakes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from anyres_vlm.config import load_config, shipped_config
from anyres_vlm.model.hub import build_model
from anyres_vlm.train.optim import build_optimizer, rate_factor
from anyres_vlm.train.stage import freeze, recipe_warnings, trained_parts


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
    ],
)
def test_just_the_stage_s_parts_are_trained(tiny_bases, stage, override, trained) -> None:
    run = config(tiny_bases, override, "stage2.weight_decay=0.1")
    model, _ = build_model(run.model, 0)
    freeze(model, trained_parts(run, stage))
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == trained
    optimizer = build_optimizer(model, run.stage(stage))
    held = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    assert held == sum(p.numel() for p in model.parameters() if p.requires_grad)
    rates = {group["lr"] for group in optimizer.param_groups}
    assert rates == {run.stage(stage).learning_rate} | ({2e-6} if "vision_tower" in trained else set())
    assert all(p.ndim > 1 for group in optimizer.param_groups if group["weight_decay"] for p in group["params"])


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
        (["model.grid=1x1"], "thumbnail alone"),
    ],
)
def test_known_mistakes_are_said(tiny_bases, overrides, words) -> None:
    assert any(words in warning for warning in recipe_warnings(config(tiny_bases, *overrides), "stage2"))
    assert recipe_warnings(config(tiny_bases), "stage2") == []
