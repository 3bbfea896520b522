"""What would fail when the model is saved at the end is found before the first step."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.state import AcceleratorState

from anyres_vlm.checkpoints.bases import build_model
from anyres_vlm.config import load_config, shipped_config
from anyres_vlm.errors import DataError
from anyres_vlm.train import saving, stage
from anyres_vlm.train.options import RunOptions
from anyres_vlm.train.recipe import freeze, trained_rates
from anyres_vlm.train.run import train


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)


def run(bases: Path, output: Path, *more: str, stages=("stage1",), steps: int = 2) -> None:
    settings = [
        f"model.llm={bases}/llm",
        f"model.encoder.name={bases}/vit",
        "stage1.data.samples=40",
        "stage2.data.samples=24",
        "stage1.max_length=512",
        "stage1.capacity=512",
        "stage2.capacity=1024",
        *more,
    ]

    def progress(*_step: object) -> None:
        raise AssertionError("a step was trained")

    train(load_config(shipped_config("tiny"), settings), RunOptions(output, stages, max_steps=steps), progress)


def assert_no_trace(folder: Path) -> None:
    assert not [path for path in folder.rglob("*") if "trial" in path.name or path.name.endswith(".partial")]
    assert not (folder / "model").exists()


def test_a_generation_config_that_cannot_be_saved(tiny_bases, tmp_path, monkeypatch) -> None:
    """Strict validation of transformers: values of sampling, and no sampling."""
    build = stage.build

    def build_broken(*arguments, **options):
        model, tokenizer = build(*arguments, **options)
        model.language_model.generation_config.temperature = 0.9
        model.language_model.generation_config.do_sample = False
        return model, tokenizer

    monkeypatch.setattr(stage, "build", build_broken)
    with pytest.raises(DataError, match=r"stage1: the model could not be saved at the end, so nothing is") as caught:
        run(tiny_bases, tmp_path)
    assert "temperature" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert_no_trace(tmp_path / "stage1")


@pytest.mark.parametrize("part", ["tokenizer", "config", "card", "adapter"])
def test_whatever_cannot_be_written(tiny_bases, tmp_path, monkeypatch, part: str) -> None:
    def fail(*_arguments, **_options) -> None:
        raise KeyError(f"no {part}\ncan be made")

    target = {
        "tokenizer": "transformers.PreTrainedTokenizerFast.save_pretrained",
        "config": "anyres_vlm.checkpoints.load_save.stock_config",
        "card": "anyres_vlm.train.stage.write_card",
        "adapter": "anyres_vlm.train.stage.save_adapter",
    }[part]
    monkeypatch.setattr(target, fail)
    more = ["stage2.lora.rank=2"] if part == "adapter" else []
    with pytest.raises(DataError, match=rf"stage2: the model could not be saved at the end.*no {part}"):
        train_stage_2(tiny_bases, tmp_path, *more)
    assert_no_trace(tmp_path / "stage2")


def train_stage_2(bases: Path, output: Path, *more: str) -> None:
    settings = [f"model.llm={bases}/llm", f"model.encoder.name={bases}/vit", "stage2.data.samples=24", *more]
    options = RunOptions(output, ("stage2",), max_steps=1, skip_stage1=True)
    train(load_config(shipped_config("tiny"), settings), options, lambda *_: None)


def test_a_folder_in_which_nothing_can_be_made(tiny_bases, tmp_path) -> None:
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage1" / "checkpoints").write_text("a file")
    with pytest.raises((DataError, OSError), match="checkpoints"):
        run(tiny_bases, tmp_path)


def test_too_little_disk_is_said_with_both_numbers(tiny_bases, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    with pytest.raises(
        DataError, match=r"stage2 needs [\d.]+ MB of disk.*, 0\.1 MB are free: 1 checkpoints of"
    ) as caught:
        train_stage_2(tiny_bases, tmp_path)
    assert "lower keep_checkpoints=2, or choose another --output" in str(caught.value)


@pytest.mark.parametrize("more", [[], ["stage2.lora.rank=16"], ["stage2.vision_lr=1e-6"]], ids=str)
def test_the_estimate_is_what_is_written(tiny_bases, tmp_path, more: list[str]) -> None:
    train_stage_2(tiny_bases, tmp_path, *more)
    settings = [f"model.llm={tiny_bases}/llm", f"model.encoder.name={tiny_bases}/vit", *more]
    config = load_config(shipped_config("tiny"), settings)
    model, _ = build_model(config.model, 0)
    if config.stage2.lora is not None:
        stage.add_lora(model, config.stage2.lora, 0)
    freeze(model, trained_rates(config, "stage2"))
    size = saving.measure_save(model)
    for expected, folder in ((size.model_bytes, "model"), (size.checkpoint_bytes, "checkpoints/step-0000001")):
        files = (tmp_path / "stage2" / folder).rglob("*.safetensors")
        assert expected == pytest.approx(sum(path.stat().st_size for path in files), rel=0.1)


def test_one_more_checkpoint_than_kept_must_fit(tmp_path, monkeypatch) -> None:
    size = saving.SaveSize({}, model_bytes=100, checkpoint_bytes=300)
    (tmp_path / "stage1" / "checkpoints" / "step-0000001").mkdir(parents=True)
    (tmp_path / "stage1" / "checkpoints" / "step-0000001" / "weights").write_bytes(bytes(250))

    def fits(free: int, num_saves: int) -> bool:
        monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        try:
            saving.require_disk(size, tmp_path / "stage1", num_saves=num_saves, keep=2)
        except DataError:
            return False
        return True

    assert fits(750, 9)  # three checkpoints and a model, less what is there
    assert not fits(749, 9)
    assert fits(150, 1)
    assert not fits(149, 1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.decode()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_checkpoints_may_lie_on_another_disk(tiny_bases, tmp_path, small_disk: Path) -> None:
    (tmp_path / "run" / "stage1").mkdir(parents=True)
    (tmp_path / "run" / "stage1" / "checkpoints").symlink_to(small_disk)
    with pytest.raises(DataError, match=rf"of disk at {re.escape(str(tmp_path))}.*checkpoints, 0\.1 MB are free"):
        run(tiny_bases, tmp_path / "run", "save_every=1")


def test_a_card_after_steps_that_were_not_finite(tmp_path) -> None:
    """A skipped step has no loss."""
    from anyres_vlm.train.report import outcome

    rows = [{"step": 1, "train/skipped": 1}, {"step": 2, "train/loss": 2.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert outcome(tmp_path) == {"steps": "2", "loss": "2.500 at first, 2.500 over the last 1 steps"}
