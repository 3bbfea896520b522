"""Runs with the feature cache: the same numbers whatever it holds, and the encoder at rest where it holds all."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from anyres_vlm.config import load_config, shipped_config
from anyres_vlm.data.index.table import read_index
from anyres_vlm.errors import UsageError
from anyres_vlm.train.metrics import read_metrics
from anyres_vlm.train.options import RunOptions
from anyres_vlm.train.run import train

# Two ranks add the same fp32 numbers in another order. Worst seen: 2e-7.
RANKS_ATOL = 2e-5


def settings(bases: Path, cache: Path, *more: str) -> list[str]:
    return [
        f"model.llm={bases}/llm",
        f"model.encoder.name={bases}/vit",
        "stage1.data.samples=40",
        "stage2.data.samples=30",
        "stage2.epochs=2",
        "stage1.capacity=1024",
        "stage2.capacity=1024",
        "stage1.packs_per_step=2",
        "stage2.packs_per_step=2",
        "save_every=1",
        f"cache_features.folder={cache}",
        *more,
    ]


def run(bases: Path, cache: Path, output: Path, *more: str, **options) -> None:
    config = load_config(shipped_config("tiny"), settings(bases, cache, *more))
    train(config, RunOptions(output, ("stage1", "stage2"), **options), lambda *step: None)


def command(bases: Path, cache: Path, output: Path, *launcher: str) -> list[str]:
    sets = [word for setting in settings(bases, cache) for word in ("--set", setting)]
    return [sys.executable, *launcher, "-m", "anyres_vlm", "train", "--output", str(output), *sets]


def numbers(output: Path, stage: str, name: str) -> list[float]:
    return [row[name] for row in read_metrics(output / stage / "metrics.jsonl")]


def tiles(output: Path, stage: str) -> list[float]:
    """Of each step, over all ranks."""
    return [row["cache/hits"] + row["cache/misses"] for row in read_metrics(output / stage / "metrics.jsonl")]


def weights(output: Path, stage: str = "stage2") -> dict[str, torch.Tensor]:
    return load_file(output / stage / "model" / "model.safetensors")


def assert_same_run(output: Path, expected: Path) -> None:
    for stage in ("stage1", "stage2"):
        assert numbers(output, stage, "train/loss") == numbers(expected, stage, "train/loss")
        assert numbers(output, stage, "train/grad_norm") == numbers(expected, stage, "train/grad_norm")
    found = weights(output)
    assert all(torch.equal(found[name], tensor) for name, tensor in weights(expected).items())


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> None:
    """accelerate keeps one state a process, and these runs differ in precision."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def cold(tiny_bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of both stages that fills the empty cache `cache` beside it."""
    output = tmp_path_factory.mktemp("cold")
    run(tiny_bases, output / "cache", output)
    return output


def test_each_tile_is_encoded_once(cold: Path, tiny_bases: Path, tmp_path: Path) -> None:
    for stage, epochs in (("stage1", 1), ("stage2", 2)):
        misses = numbers(cold, stage, "cache/misses")
        needed = epochs * read_index(cold / stage / "index.parquet").tiles.sum()
        assert needed <= sum(tiles(cold, stage)) <= needed + 2 * len(misses)  # a pack of text alone shows a blank tile
        assert misses[0] > 0
    assert not any(misses[len(misses) // 2 :])  # the second epoch
    run(tiny_bases, cold / "cache", tmp_path)
    assert not any(numbers(tmp_path, "stage1", "cache/misses") + numbers(tmp_path, "stage2", "cache/misses"))
    assert_same_run(tmp_path, cold)


def test_half_a_cache_a_kill_and_a_resumption_change_nothing(cold: Path, tiny_bases: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(cold / "cache", cache)
    for path in cache.glob("*/*.features"):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2 + 33])
    process = subprocess.Popen(command(tiny_bases, cache, tmp_path), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "stage2" / "checkpoints" / "step-0000001").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "stage2" / "model").exists()
    run(tiny_bases, cache, tmp_path)
    assert_same_run(tmp_path, cold)
    assert sum(numbers(tmp_path, "stage1", "cache/misses")) < sum(numbers(cold, "stage1", "cache/misses"))


def test_two_ranks_share_a_cache(cold: Path, tiny_bases: Path, tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29547"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    cache = tmp_path / "cache"
    words = command(tiny_bases, cache, tmp_path, *launcher)
    subprocess.run(words, check=True, env=environment, capture_output=True, timeout=300)
    for stage in ("stage1", "stage2"):
        assert numbers(tmp_path, stage, "train/loss") == pytest.approx(numbers(cold, stage, "train/loss"), abs=1e-4)
        for name, tensor in weights(cold, stage).items():
            found = weights(tmp_path, stage)[name]
            torch.testing.assert_close(found, tensor, atol=RANKS_ATOL, rtol=0, msg=name)
        extra = [two - one for two, one in zip(tiles(tmp_path, stage), tiles(cold, stage), strict=True)]
        assert set(extra) <= {0, 1}, "a rank without a pack shows itself a blank tile"
    assert len(list(cache.iterdir())) == 1
    assert len(list(cache.glob("*/*.features"))) >= 2
    misses = numbers(tmp_path, "stage2", "cache/misses")
    assert not any(misses[len(misses) // 2 :]), "what one rank encoded in the first epoch the other reads in the second"


def test_other_layers_and_precisions_have_their_own(cold: Path, tiny_bases: Path, tmp_path: Path) -> None:
    for number, more in enumerate((["model.encoder.layer=-3"], ["precision=bf16"])):
        for cache in (cold / "cache", tmp_path / f"fresh{number}"):
            AcceleratorState._reset_state(reset_partial_state=True)
            run(tiny_bases, cache, tmp_path / f"{number}{cache.name}", *more, max_steps=1)
        assert_same_run(tmp_path / f"{number}cache", tmp_path / f"{number}fresh{number}")
    assert len(list((cold / "cache").iterdir())) == 3


def test_the_cache_is_part_of_a_run_but_not_its_place(cold: Path, tiny_bases: Path, tmp_path: Path) -> None:
    run(tiny_bases, tmp_path / "elsewhere", cold, "cache_features.max_gb=1")
    with pytest.raises(UsageError, match=r"cache_features: True before, False now"):
        run(tiny_bases, tmp_path, cold, "cache_features=null")


def test_a_run_says_what_it_needs(tiny_bases: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    more = ["cache_features.max_gb=0.00001", "stage1.data.augment={}"]
    run(tiny_bases, tmp_path / "cache", tmp_path, *more, max_steps=1)
    count = read_index(tmp_path / "stage1" / "index.parquet").tiles.sum()
    lines = [line for line in caplog.messages if line.startswith("stage1: features of")]
    assert len(lines) == 1
    assert f"features of {count:,} tiles take up to {count * 4 * 32 * 2 / 1e9:.2f} GB" in lines[0]
    assert f"{10_000 / (count * 256):.0%} of them: raise cache_features.max_gb" in lines[0]
    assert sum("data.augment changes images" in line for line in caplog.messages) == 1
    assert sum("is full at max_gb=1e-05" in line for line in caplog.messages) == 2  # once a stage
    assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*/*")) <= 10_000
