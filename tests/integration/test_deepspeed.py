"""DeepSpeed really runs, on CPU over gloo: the steps of every ZeRO stage are those of one plain process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deepspeed_files import PUBLISHED
from safetensors.torch import load_file

from anyres_vlm.cli.main import main
from anyres_vlm.train.metrics import read_metrics

STEPS = 3
SETTINGS = {
    "stage1.data.samples": "40",
    "stage2.data.samples": "60",
    "stage1.max_length": "512",
    "stage1.capacity": "512",
    "stage2.capacity": "1024",
    "stage1.packs_per_step": "4",
    "stage2.packs_per_step": "4",
    "save_every": "2",
}
# Ranks and ZeRO stages add the same fp32 numbers in other orders, and AdamW makes of a gradient that is rounding alone
# a step of any size up to the rate, 2e-3 here. Worst seen over these runs: 9.7e-6; test_step_matrix.py has none such.
ATOL = 3e-5


def train(bases: Path, output: Path, ranks: int, *more: str) -> None:
    """Three steps of each stage on so many ranks."""
    sets = {"model.llm": f"{bases}/llm", "model.encoder.name": f"{bases}/vit", **SETTINGS}
    words = [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = ["-m", "anyres_vlm", "train", "--output", str(output), "--max-steps", str(STEPS), *words, *more]
    done = subprocess.run(
        [sys.executable, *launcher, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def weights(output: Path, stage: str) -> dict[str, torch.Tensor]:
    return load_file(output / stage / "model" / "model.safetensors")


def assert_same_run(found: Path, expected: Path) -> None:
    for stage in ("stage1", "stage2"):
        losses = [
            [row["train/loss"] for row in read_metrics(run / stage / "metrics.jsonl")] for run in (found, expected)
        ]
        assert losses[0] == pytest.approx(losses[1], abs=1e-4)
        ours, theirs = weights(found, stage), weights(expected, stage)
        assert ours.keys() == theirs.keys()
        worst = max(float((ours[name] - tensor).abs().max()) for name, tensor in theirs.items())
        assert worst < ATOL, f"{stage}: the furthest weight is {worst:.1e} off"


@pytest.fixture(scope="module")
def plain(tiny_bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run in one plain process."""
    output = tmp_path_factory.mktemp("plain")
    train(tiny_bases, output, 1)
    return output


@pytest.mark.parametrize(("preset", "ranks"), [("zero1", 1), ("zero2", 2), ("zero3", 2)])
def test_zero_takes_the_steps_of_one_plain_process(plain: Path, tiny_bases, tmp_path, preset: str, ranks: int) -> None:
    train(tiny_bases, tmp_path, ranks, "--deepspeed", preset)
    assert_same_run(tmp_path, plain)


def test_a_plain_checkpoint_goes_on_under_zero_3(plain: Path, tiny_bases, tmp_path) -> None:
    """One plain process saved step 2 of 3; two ranks of ZeRO-3 take the third step from it."""
    shutil.copytree(plain, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "stage2" / "model")
    shutil.rmtree(tmp_path / "run" / "stage2" / "checkpoints" / "step-0000003")
    train(tiny_bases, tmp_path / "run", 2, "--deepspeed", "zero3")
    assert_same_run(tmp_path / "run", plain)


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        pytest.param("llava-zero2", 1, marks=pytest.mark.slow),
        ("llava-zero3_offload", 1),
        pytest.param("llama-factory-z0", 1, marks=pytest.mark.slow),
        pytest.param("llama-factory-z2_offload", 1, marks=pytest.mark.slow),
        ("transformers-zero3", 2),
    ],
)
def test_published_files_take_the_steps_of_one_plain_process(
    plain: Path, tiny_bases, tmp_path, name: str, ranks: int
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(PUBLISHED[name]), encoding="utf-8")
    train(tiny_bases, tmp_path / "run", ranks, "--deepspeed", str(path))
    assert_same_run(tmp_path / "run", plain)


def test_a_contradiction_of_stage_2_ends_the_run_before_stage_1(tiny_bases, tmp_path, capsys) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"train_batch_size": 16, "zero_optimization": {"stage": 2}}', encoding="utf-8")
    words = ["--set", "stage2.batch_size=8", "--deepspeed", str(path), "--output", str(tmp_path / "run")]
    assert main(["train", *words]) == 2
    assert "train_batch_size is 16, the run has stage2.batch_size=8" in capsys.readouterr().err
    assert not (tmp_path / "run" / "stage1").exists()
