"""Bytes of a rank against those that torch allocates and DeepSpeed estimates, and how a trace depends on its pack."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from torch import nn

from anyres_vlm.config import RunConfig, load_config, shipped_config
from anyres_vlm.errors import UsageError
from anyres_vlm.model.quantize import Nf4Linear
from anyres_vlm.preflight.estimate.activations import PackSize, StepBytes, micro_step_bytes
from anyres_vlm.preflight.estimate.choice import Machines
from anyres_vlm.preflight.estimate.memory import Sharding, StageMemory, count_parameters, rank_memory, read_sharding
from anyres_vlm.preflight.estimate.workload import StageSamples, find_device
from anyres_vlm.train.options import RunOptions
from anyres_vlm.train.stage import build

NOTHING = StepBytes(0, 0, 0)
MILLION = nn.ParameterList([nn.Parameter(torch.empty(1_000_000, device="meta"))])


def memory(sharding: Sharding, ranks: int, numbers: str = "bf16", step: StepBytes = NOTHING):  # type: ignore[no-untyped-def]
    return rank_memory(count_parameters(MILLION, sharding), sharding, numbers, ranks, step)  # type: ignore[arg-type]


def test_a_plain_rank_holds_what_torch_allocates() -> None:
    """Weights, gradients and both moments of AdamW of a really trained model, in fp32."""
    model = nn.Sequential(nn.Linear(300, 200), nn.GELU(), nn.Linear(200, 100, bias=False))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 300)).sum().backward()
    optimizer.step()
    weights = list(model.parameters())
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    allocated = sum(x.nbytes for x in (*weights, *(weight.grad for weight in weights), *moments))  # type: ignore[union-attr]
    sharding = Sharding("none")
    for ranks in (1, 8):
        count = count_parameters(model, sharding)
        assert rank_memory(count, sharding, "autocast", ranks, NOTHING).resting == allocated


@pytest.mark.parametrize("ranks", [1, 4, 64])
def test_zero_holds_what_deepspeed_estimates(ranks: int) -> None:
    """Its own estimators, but for 16-bit gradients under ZeRO-2 and a whole layer under ZeRO-3, which are not resting.

    test_step_matrix.py compares every stage with bytes that are really allocated.
    """
    stage_2 = memory(Sharding("z2", stage=2), ranks).resting
    assert stage_2 == estimate_zero2_model_states_mem_needs(10**6, ranks, 1, cpu_offload=False)[1] - 2e6 / ranks
    stage_3 = memory(Sharding("z3", stage=3), ranks).resting
    _, theirs, layer = estimate_zero3_model_states_mem_needs(10**6, 10**5, ranks, 1, False, False)
    assert stage_3 == theirs - layer


def test_the_host_holds_what_is_read_and_then_the_checkpoint() -> None:
    frozen = nn.Parameter(torch.empty(9_000_000, device="meta"), requires_grad=False)
    for sharding, numbers, item in ((Sharding("none"), "autocast", 4), (Sharding("z3", stage=3), "bf16", 2)):
        count = count_parameters(nn.ParameterList([frozen]), sharding)
        assert rank_memory(count, sharding, numbers, 8, NOTHING).host == item * 9e6  # type: ignore[arg-type]
        count = count_parameters(nn.ParameterList([*MILLION, frozen]), sharding)
        assert rank_memory(count, sharding, numbers, 8, NOTHING).host == max(12e6, item * 10e6)  # type: ignore[arg-type]


def test_the_busiest_phase_decides() -> None:
    update = memory(Sharding("z3", stage=3, subgroup=10**9), 1)
    assert update.peak == update.resting + 4e6  # the copy of the gradients
    step = StepBytes(forward=3_000_000, held=2_000_000, backward=9_000_000)
    busy = memory(Sharding("z3", stage=3, subgroup=10**9), 1, step=step)
    assert busy.peak == busy.resting + 9e6
    assert busy.activations == 2e6


def test_a_preset_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text("[")
    with pytest.raises(UsageError, match="cannot be read as JSON"):
        read_sharding(str(tmp_path / "own.json"))


def tiny(tiny_bases: Path, *settings: str) -> RunConfig:
    bases = (f"model.llm={tiny_bases}/llm", f"model.encoder.name={tiny_bases}/vit")
    return load_config(shipped_config("tiny"), [*bases, *settings])


def test_activations_grow_with_the_pack_and_shrink_by_checkpointing(tiny_bases: Path) -> None:
    small, large = PackSize(1000, 4, 8, 200), PackSize(2000, 8, 16, 400)
    one, two = micro_step_bytes(tiny(tiny_bases), "stage2", [small, large], "fp32")
    assert two.held == pytest.approx(2 * one.held, rel=0.1)
    [less] = micro_step_bytes(tiny(tiny_bases, "stage2.activation_checkpointing=true"), "stage2", [small], "fp32")
    [frozen] = micro_step_bytes(tiny(tiny_bases), "stage1", [small], "fp32")
    [half] = micro_step_bytes(tiny(tiny_bases), "stage2", [small], "bf16")
    assert less.held < 0.5 * one.held
    assert frozen.held < 0.8 * one.held
    assert half.held == pytest.approx(0.5 * one.held, rel=0.2)


def test_checkpointing_of_every_second_layer_lies_between(tiny_bases: Path, tmp_path: Path) -> None:
    """Six layers: all is extrapolated from one and two layers, every second from two and four."""
    shutil.copytree(tiny_bases / "llm", tmp_path / "llm")
    file = tmp_path / "llm" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 6}))
    pack, held = PackSize(1000, 4, 8, 200), []
    for every in ("true", "2", "false"):
        run = tiny(tiny_bases, f"model.llm={tmp_path / 'llm'}", f"stage2.activation_checkpointing={every}")
        [step] = micro_step_bytes(run, "stage2", [pack], "fp32")
        held.append(step.held)
    assert held[0] < held[1] < held[2]
    assert held[1] == pytest.approx((held[0] + held[2]) / 2, rel=0.1)


def test_a_trained_encoder_keeps_its_activations(tiny_bases: Path) -> None:
    pack = PackSize(1000, 4, 40, 200)
    [frozen] = micro_step_bytes(tiny(tiny_bases), "stage2", [pack], "fp32")
    [trained] = micro_step_bytes(tiny(tiny_bases, "stage2.vision_lr=1e-5"), "stage2", [pack], "fp32")
    assert trained.held > frozen.held


def test_more_layers_follow_from_few(tiny_bases: Path, tmp_path: Path) -> None:
    """Four layers by the difference of two traces hold what their own differences in steps of one say."""
    held = []
    for layers in (2, 3, 4):
        folder = tmp_path / str(layers)
        folder.mkdir()
        settings = json.loads((tiny_bases / "llm" / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": layers}))
        config = tiny(tiny_bases, f"model.llm={folder}")
        held += micro_step_bytes(config, "stage2", [PackSize(1000, 4, 8, 200)], "bf16")
    assert held[2].held - held[1].held == held[1].held - held[0].held > 0


def test_devices() -> None:
    device = find_device("H100-80GB")
    assert (device.memory, device.peak) == (80e9, 989.4e12)
    with pytest.raises(UsageError, match=r"--device a100-80: expected one of a100-40gb, .*; did you mean a100-80gb\?"):
        find_device("a100-80")


@pytest.mark.parametrize(
    "setting",
    ["stage2.lora={rank: 8}", "model.encoder={kind: timm, name: vit_tiny_patch16_224}", "model.encoder.layer=-1"],
)
def test_other_parts_are_traced(setting: str) -> None:
    config = load_config(shipped_config("tiny"), [setting])
    [step] = micro_step_bytes(config, "stage2", [PackSize(500, 1, 2, 100)], "bf16")
    assert 0 < step.held < step.peak


@pytest.mark.parametrize("lora", ["{rank: 4}", "{rank: 4, quantize: nf4}"])
def test_frozen_weights_take_the_bytes_that_a_stage_holds(tiny_bases: Path, tmp_path: Path, lora: str) -> None:
    config = tiny(tiny_bases, "precision=bf16", f"stage2.lora={lora}")
    options = RunOptions(tmp_path, ("stage2",), skip_stage1=True)
    model, _ = build(config, options, "stage2", is_split=False, device=torch.device("cpu"))
    packed = [layer.scales for layer in model.modules() if isinstance(layer, Nf4Linear)]
    held = sum(parameter.nbytes for parameter in model.parameters())
    held += sum(scales.absmax.nbytes + scales.state2.absmax.nbytes for scales in packed)
    assert bool(packed) == ("nf4" in lora)
    samples = StageSamples(np.array([100]), np.array([2]), np.array([50]), "one")
    stage = StageMemory(config, "stage2", samples, ranks=1)
    # Small layers end in blocks that are not full.
    assert stage.without_packs(Sharding("none")).weights == pytest.approx(held, rel=0.01 if packed else 0)


def test_context_and_buffers_leave_less_for_tensors() -> None:
    one, two = (Machines(find_device("l4-24gb"), gpus, headroom=0.05, mfu=0.4) for gpus in (1, 2))
    assert one.usable == 24e9 * 0.95 - 0.6e9
    assert one.usable - two.usable == pytest.approx(1e9)
