"""Stage 2 with adapters: exact resumption after a kill, a whole stock checkpoint, two ranks as one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from killable import Killed, train_here
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlavaNextForConditionalGeneration

from anyres_vlm.errors import UsageError
from anyres_vlm.train.metrics import read_metrics
from anyres_vlm.train.options import RunOptions

# Two ranks add the same fp32 numbers in another order. Worst seen over these 3 steps: 1e-7.
RANKS_ATOL = 2e-6
LOGITS_ATOL = 2e-5  # merged against peft's; worst seen: 1e-6
STEPS = 4


def settings(bases: Path, *more: str) -> list[str]:
    return [
        f"model.llm={bases}/llm",
        f"model.encoder.name={bases}/vit",
        "stage2.data.samples=24",
        "stage2.capacity=1024",
        "stage2.packs_per_step=2",
        "stage2.lora.rank=4",
        "stage2.lora.alpha=8",
        "save_every=2",
        *more,
    ]


def run(bases: Path, output: Path, *more: str, steps: int = STEPS, killed_after: int | None = None) -> None:
    options = RunOptions(output, ("stage2",), max_steps=steps, skip_stage1=True)
    train_here(settings(bases, *more), options, killed_after)


def weights(output: Path, name: str = "model/model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(output / "stage2" / name)


def losses(output: Path) -> list[float]:
    return [row["train/loss"] for row in read_metrics(output / "stage2" / "metrics.jsonl")]


def test_killed_and_resumed_is_the_undisturbed_run(tiny_bases: Path, tmp_path: Path) -> None:
    dropout = "stage2.lora.dropout=0.3"
    run(tiny_bases, tmp_path / "whole", dropout)
    with pytest.raises(Killed):
        run(tiny_bases, tmp_path / "killed", dropout, killed_after=3)
    assert not (tmp_path / "killed" / "stage2" / "model").exists()
    torch.manual_seed(int.from_bytes(os.urandom(4)))  # what is left from elsewhere decides nothing
    run(tiny_bases, tmp_path / "killed", dropout)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    for name in ("model/model.safetensors", "model/adapter/adapter_model.safetensors"):
        expected, found = weights(tmp_path / "whole", name), weights(tmp_path / "killed", name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    with pytest.raises(UsageError, match=r"stage2\.lora\.rank: 4 before, 8 now"):
        run(tiny_bases, tmp_path / "killed", dropout, "stage2.lora.rank=8")


@pytest.mark.parametrize("more", [[], ["precision=bf16", "stage2.activation_checkpointing=true"]], ids=str)
def test_the_folder_is_a_stock_checkpoint_and_an_adapter(tiny_bases: Path, tmp_path: Path, more: list[str]) -> None:
    run(tiny_bases, tmp_path, "stage2.lora.learning_rate=3e-3", *more, steps=2)
    folder = tmp_path / "stage2" / "model"
    stock, outcome = LlavaNextForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(outcome[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    base = AutoModelForCausalLM.from_pretrained(tiny_bases / "llm")
    if "precision=bf16" in more:  # frozen matrices are held and saved in bf16
        for layer in base.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.weight.data = layer.weight.data.bfloat16().float()
    merged = weights(tmp_path)
    for name, tensor in base.state_dict().items():
        is_adapted = "proj" in name
        assert torch.equal(merged[f"language_model.{name}"], tensor) != is_adapted, name
    ids = torch.tensor([[1, 40, 41, 42, 9, 70, 2]])
    with torch.inference_mode():
        theirs = PeftModel.from_pretrained(base, folder / "adapter")
        torch.testing.assert_close(
            stock.eval()(input_ids=ids).logits, theirs.eval()(ids).logits, atol=LOGITS_ATOL, rtol=0
        )


def test_two_ranks_with_adapters_and_a_trained_encoder_take_the_steps_of_one(tiny_bases: Path, tmp_path: Path) -> None:
    more = ["stage2.vision_lr=1e-4", "model.encoder.layer=[-3,1]"]
    run(tiny_bases, tmp_path / "one", *more, steps=3)
    sets = [word for setting in settings(tiny_bases, *more) for word in ("--set", setting)]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29557"]
    command = ["-m", "anyres_vlm", "train", "--stage", "2", "--skip-stage1", "--max-steps", "3", *sets]
    subprocess.run(
        [sys.executable, *launcher, *command, "--output", str(tmp_path / "two")],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=200,
    )
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=RANKS_ATOL, rtol=0, msg=name)
    moved = {
        name: float((one[f"vision_tower.vision_model.{name}"] - tensor).abs().max())
        for name, tensor in load_file(tiny_bases / "vit" / "model.safetensors").items()
    }
    for name, distance in moved.items():
        if "layers.1." in name or "layers.2." in name or "post_layernorm" in name:
            assert distance == 0, name
        else:
            assert distance <= 3e-4, name  # three steps of AdamW at 1e-4
    assert moved["encoder.layers.0.mlp.fc1.weight"] > 5e-5
