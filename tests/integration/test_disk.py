"""A full or read-only disk while a run saves: one clear line, the checkpoint before it whole, and the run goes on."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from anyres_vlm.config import load_config, shipped_config
from anyres_vlm.errors import DataError
from anyres_vlm.train.checkpoint import latest
from anyres_vlm.train.options import RunOptions
from anyres_vlm.train.run import train

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")

STEPS = 6


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, of 64 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.decode()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def run(bases: Path, output: Path, after_step=lambda step: None) -> dict[str, torch.Tensor]:
    settings = [
        f"model.llm={bases}/llm",
        f"model.encoder.name={bases}/vit",
        "stage1.data.samples=60",
        "stage1.max_length=512",
        "stage1.capacity=512",
        "stage1.packs_per_step=2",
        "save_every=2",
    ]
    options = RunOptions(output, ("stage1",), max_steps=STEPS)
    train(load_config(shipped_config("tiny"), settings), options, lambda stage, step, *rest: after_step(step))
    return load_file(output / "stage1" / "model" / "model.safetensors")


def fill(disk: Path) -> None:
    """Leave no room but for a few lines of metrics."""
    with (disk / "other").open("wb") as file:
        free = os.statvfs(disk)
        file.write(bytes(free.f_bavail * free.f_frsize - 40_000))


def test_a_full_disk_leaves_the_checkpoint_before_it(tiny_bases, tmp_path: Path, disk: Path) -> None:
    def after_step(step: int) -> None:
        if step == 3:
            fill(disk)

    with pytest.raises(DataError, match=r"step-0000004 cannot be written \(.*[Nn]o space left.*make room") as caught:
        run(tiny_bases, disk / "run", after_step)
    assert "\n" not in str(caught.value)
    checkpoints = disk / "run" / "stage1" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-0000002"]
    found = latest(checkpoints)
    assert found is not None
    assert found[1].step == 2
    (disk / "other").unlink()
    resumed, expected = run(tiny_bases, disk / "run"), run(tiny_bases, tmp_path / "whole")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())


def test_a_disk_that_becomes_read_only(tiny_bases, tmp_path: Path, disk: Path) -> None:
    """That of the checkpoints alone, between two saves; root cannot be kept out of a folder otherwise."""
    checkpoints = tmp_path / "run" / "stage1" / "checkpoints"
    checkpoints.parent.mkdir(parents=True)
    checkpoints.symlink_to(disk)

    def after_step(step: int) -> None:
        if step == 3:  # the checkpoint of step 2 may still be written
            while not (disk / "step-0000002").exists():
                pass
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)

    with pytest.raises(DataError, match=r"step-0000004 cannot be written \(.*[Rr]ead-only file system"):
        run(tiny_bases, tmp_path / "run", after_step)
