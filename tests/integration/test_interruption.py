"""Signals, broken checkpoints and steps that are not finite: the run leaves in order or says why it cannot go on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from anyres_vlm.config import load_config, shipped_config
from anyres_vlm.errors import DataError
from anyres_vlm.train.metrics import read_metrics
from anyres_vlm.train.options import MARKER, RunOptions
from anyres_vlm.train.run import train

STEPS = 6


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)


def settings(bases: Path, *more: str) -> list[str]:
    return [
        f"model.llm={bases}/llm",
        f"model.encoder.name={bases}/vit",
        "stage1.data.samples=60",
        "stage1.max_length=512",
        "stage1.capacity=512",
        "stage1.packs_per_step=2",
        "save_every=2",
        *more,
    ]


def run(bases: Path, output: Path, *more: str) -> dict[str, torch.Tensor]:
    config = load_config(shipped_config("tiny"), settings(bases, *more))
    train(config, RunOptions(output, ("stage1",), max_steps=STEPS), lambda *step: None)
    return load_file(output / "stage1" / "model" / "model.safetensors")


def catches(process: int, number: signal.Signals) -> bool:
    (caught,) = re.findall(r"^SigCgt:\s*(\w+)", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    return bool(int(caught, 16) >> (number - 1) & 1)


@pytest.mark.parametrize(("number", "is_early"), [(signal.SIGTERM, True), (signal.SIGUSR1, False)])
def test_a_signal_saves_and_leaves_and_the_run_goes_on(
    tiny_bases, tmp_path, number: signal.Signals, is_early: bool
) -> None:
    """An early signal comes while torch is imported: no data is read yet, and the first step is still taken."""
    words = [word for setting in settings(tiny_bases, "save_every=100") for word in ("--set", setting)]
    command = [sys.executable, "-m", "anyres_vlm", "train", "--stage", "1", "--output", str(tmp_path / "run")]
    process = subprocess.Popen(
        [*command, "--max-steps", str(STEPS), *words], stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    rows = tmp_path / "run" / "stage1" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (catches(process.pid, number) if is_early else rows.exists() and rows.read_text()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert rows.parent.exists() != is_early
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == os.EX_TEMPFAIL
    assert f"interrupted: stage1 is saved after step {'1 of' if is_early else ''}" in errors
    assert (tmp_path / "run" / MARKER).exists()
    resumed = run(tiny_bases, tmp_path / "run", "save_every=100")
    assert not (tmp_path / "run" / MARKER).exists()
    expected = run(tiny_bases, tmp_path / "whole", "save_every=100")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())


def test_a_broken_checkpoint_is_passed_over(tiny_bases, tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    expected = run(tiny_bases, tmp_path / "run", "keep_checkpoints=2")
    folder = tmp_path / "run" / "stage1"
    (folder / "model").rename(tmp_path / "elsewhere")
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-0000004", "step-0000005"]
    moments = folder / "checkpoints" / "step-0000005" / "trainer" / "moments.safetensors"
    moments.write_bytes(moments.read_bytes()[:-100])
    resumed = run(tiny_bases, tmp_path / "run", "keep_checkpoints=2")
    assert "step-0000005: not a whole checkpoint" in caplog.text
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())


def test_steps_that_are_not_finite_are_skipped_and_capped(tiny_bases, tmp_path, caplog) -> None:
    weights = load_file(tiny_bases / "llm" / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], float("nan"))
    broken = tmp_path / "llm"
    broken.mkdir()
    for path in (tiny_bases / "llm").iterdir():
        if path.name != "model.safetensors":
            (broken / path.name).write_bytes(path.read_bytes())
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"stage1: 3 steps were not finite, the last one step 3: .*max_skipped_steps"):
        run(tiny_bases, tmp_path / "run", f"model.llm={broken}", "max_skipped_steps=2")
    assert "the loss is not finite; samples of the pack: " in caplog.text
    rows = read_metrics(tmp_path / "run" / "stage1" / "metrics.jsonl")
    assert [row["train/skipped"] for row in rows] == [1, 1, 1]
    assert "train/loss" not in rows[0]
