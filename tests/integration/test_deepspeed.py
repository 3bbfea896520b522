"""DeepSpeed really runs, on CPU over gloo: the steps of every ZeRO stage are those of one plain process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from anyres_vlm.train.metrics import read_metrics

STEPS = 3
# Ranks, micro-steps and ZeRO stages add the same fp32 numbers in other orders, and AdamW's first steps divide small
# gradients by their own size. Worst seen over these runs: see the measurement in each test's message.
ATOL = 5e-5


def train(bases: Path, output: Path, ranks: int, *more: str) -> dict[str, torch.Tensor]:
    """Three steps of both stages on so many ranks; the weights of stage 2."""
    sets = {
        "model.llm": f"{bases}/llm",
        "model.encoder.name": f"{bases}/vit",
        "stage1.data.samples": "40",
        "stage2.data.samples": "40",
        "stage1.max_length": "512",
        "stage1.capacity": "512",
        "stage2.capacity": "1024",
        "stage1.packs_per_step": "4",
        "stage2.packs_per_step": "4",
        "save_every": "2",
    }
    words = [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [*launcher, "-m", "anyres_vlm", "train", "--output", str(output), "--max-steps", str(STEPS), *words, *more],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(output / "stage2" / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def plain(tiny_bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("plain")
    train(tiny_bases, output, 1)
    return output


@pytest.mark.parametrize(("preset", "ranks"), [("zero1", 1), ("zero2", 2), ("zero3", 2)])
def test_zero_takes_the_steps_of_one_plain_process(plain: Path, tiny_bases, tmp_path, preset: str, ranks: int) -> None:
    found = train(tiny_bases, tmp_path, ranks, "--deepspeed", preset)
    for stage in ("stage1", "stage2"):
        losses = [
            [row["train/loss"] for row in read_metrics(output / stage / "metrics.jsonl")]
            for output in (tmp_path, plain)
        ]
        assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    expected = load_file(plain / "stage2" / "model" / "model.safetensors")
    assert found.keys() == expected.keys()
    worst = max(float((found[name] - tensor).abs().max()) for name, tensor in expected.items())
    print(preset, ranks, worst)
    assert worst < ATOL, f"{preset} on {ranks} ranks: worst difference {worst:.1e}"
