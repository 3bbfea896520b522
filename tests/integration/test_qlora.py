"""QLoRA: layers in NF4, resumed to the bit, merged into a stock checkpoint in bf16, refused where it cannot work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from killable import Killed, train_here
from safetensors.torch import load_file
from transformers import LlavaNextForConditionalGeneration

from anyres_vlm.checkpoints.bases import build_model
from anyres_vlm.config import load_config, shipped_config
from anyres_vlm.errors import UsageError
from anyres_vlm.model import quantize
from anyres_vlm.model.quantize import Nf4Linear
from anyres_vlm.train.metrics import read_metrics
from anyres_vlm.train.options import RunOptions

LOGITS_ATOL = 0.05  # of the merged model in bf16 against NF4 and adapters; worst seen: see the assertion's message
RANKS_RTOL = 2e-2  # losses in bf16


def settings(bases: Path, *more: str) -> list[str]:
    return [
        f"model.llm={bases}/llm",
        f"model.encoder.name={bases}/vit",
        "precision=bf16",
        "stage2.data.samples=24",
        "stage2.capacity=1024",
        "stage2.packs_per_step=2",
        "stage2.lora={rank: 4, quantize: nf4, learning_rate: 3e-3}",
        "save_every=2",
        *more,
    ]


def run(bases: Path, output: Path, *more: str, steps: int = 4, killed_after: int | None = None) -> None:
    options = RunOptions(output, ("stage2",), max_steps=steps, skip_stage1=True)
    train_here(settings(bases, *more), options, killed_after)


def losses(output: Path) -> list[float]:
    return [row["train/loss"] for row in read_metrics(output / "stage2" / "metrics.jsonl")]


@pytest.fixture(scope="module")
def whole(tiny_bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole")
    run(tiny_bases, output)
    return output


def test_killed_and_resumed_is_the_undisturbed_run(whole: Path, tiny_bases: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tiny_bases, tmp_path, killed_after=3)
    run(tiny_bases, tmp_path, "stage2.activation_checkpointing=false")
    assert losses(tmp_path) == losses(whole)
    for name in ("model/model.safetensors", "model/adapter/adapter_model.safetensors"):
        expected, found = load_file(whole / "stage2" / name), load_file(tmp_path / "stage2" / name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    saved = load_file(max((whole / "stage2" / "checkpoints").iterdir()) / "trainer" / "weights.safetensors")
    assert all(".lora_" in name or name.startswith(("multi_modal", "image_newline")) for name in saved)
    with pytest.raises(UsageError, match=r"stage2\.lora\.quantize: 'nf4' before, not set now"):
        run(tiny_bases, tmp_path, "stage2.lora.quantize=null")


def test_the_folder_is_a_merged_stock_checkpoint_in_bf16(whole: Path, tiny_bases: Path) -> None:
    """Each adapted weight is the NF4 one, as bitsandbytes unpacks it, plus the adapter, rounded to bf16."""
    folder = whole / "stage2" / "model"
    stock, outcome = LlavaNextForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(outcome[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert stock.dtype == torch.bfloat16
    merged, base = load_file(folder / "model.safetensors"), load_file(tiny_bases / "llm" / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    checked = 0
    for name, tensor in base.items():
        expected = tensor.bfloat16()
        if name.endswith("_proj.weight"):
            packed, scales = quantize_4bit(expected, quant_type="nf4", compress_statistics=True)
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            low, high = (adapter[f"{stem}.lora_{half}.weight"] for half in "AB")
            assert high.abs().max() > 0
            expected = (dequantize_4bit(packed, scales) + (high @ low) * 2).bfloat16()
            checked += 1
        assert torch.equal(merged[f"language_model.{name}"], expected), name
    assert checked == 14


@pytest.mark.parametrize(("ranks", "more"), [(2, []), (1, ["--deepspeed", "zero2"])], ids=str)
def test_other_ways_take_the_same_steps(whole: Path, tiny_bases: Path, tmp_path: Path, ranks: int, more) -> None:
    sets = [word for setting in settings(tiny_bases) for word in ("--set", setting)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if ranks > 1 else []
    command = ["-m", "anyres_vlm", "train", "--stage", "2", "--skip-stage1", "--max-steps", "3", *sets, *more]
    done = subprocess.run(
        [sys.executable, *launcher, *command, "--output", str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path) == pytest.approx(losses(whole)[:3], rel=RANKS_RTOL)
    merged = load_file(tmp_path / "stage2" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}


def test_packed_layers_hold_4_bits_and_follow_their_device(tiny_bases: Path) -> None:
    model, _ = build_model(load_config(shipped_config("tiny"), settings(tiny_bases)).model, 0)
    plain = model.state_dict()
    names = [name for name, _ in quantize.decoder_matrices(model.language_model)]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    names = [name for name, _ in quantize.decoder_matrices(model.language_model)]
    quantize.quantize(model.language_model, "4bit", lambda _: torch.device("cpu"))
    packed = [module for module in model.modules() if isinstance(module, Nf4Linear)]
    assert len(packed) == len(names) == 14
    assert type(model.language_model.get_output_embeddings()) is torch.nn.Linear
    layer = packed[0]
    held = layer.weight.nbytes + sum(t.nbytes for t in (layer.scales.absmax, layer.scales.state2.absmax))
    assert 8 * held / (layer.in_features * layer.out_features) < 4.3
    assert model.to(torch.bfloat16).state_dict().keys() == plain.keys()
    assert layer.weight.dtype == torch.uint8
    assert layer.to("meta").scales.absmax.is_meta


def test_zero_3_and_a_missing_library_are_refused(tiny_bases: Path, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(UsageError, match=r"lora\.quantize does not work with ZeRO-3.*use zero2"):
        run(tiny_bases, tmp_path / "zero3", "stage2.deepspeed=zero3")
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    words = r"stage2\.lora\.quantize=nf4 needs bitsandbytes: pip install 'anyres-vlm\[quantize\]'"
    with pytest.raises(UsageError, match=words):
        run(tiny_bases, tmp_path / "missing")
    assert not (tmp_path / "missing").exists()
