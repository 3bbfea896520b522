"""What `anyres init` writes is trained on, by the command that it prints."""

from __future__ import annotations

import io
import json
import shlex
from pathlib import Path

import pytest

from anyres_vlm.cli.main import main
from anyres_vlm.config import CheckpointConfig, ModelConfig, load_config
from anyres_vlm.data.sources import open_source
from anyres_vlm.preflight.init import MODELS, fitting_batch
from anyres_vlm.synthetic.dataset import write_dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), "instructions", 12, 0)


def init(*words: object) -> int:
    return main(["init", *map(str, words)])


def test_defaults_are_written_and_trained(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "mine"
    assert init(folder, "--data", data, "--model", "tiny", "--gpus", 0, "--yes") == 0
    said = capsys.readouterr().out
    assert "LLaVA JSON, 12 records; 12 of 12 inspected ones are usable" in said
    assert len(open_source(folder / "mixture.yaml")) == 12
    assert (folder / "config.yaml").read_text().count("#") > 15, "commented"
    (command,) = [line.removeprefix("train:") for line in said.splitlines() if line.startswith("train:")]
    assert main([*shlex.split(command)[1:], "--max-steps", "1", "--set", "workers=0"]) == 0
    trained = folder / "run" / "stage2" / "model"
    assert (trained / "model.safetensors").exists()

    assert init(tmp_path / "further", "--data", data, "--model", trained, "--gpus", 0, "--yes") == 0
    assert "train --config" in capsys.readouterr().out
    path = tmp_path / "further" / "config.yaml"
    assert load_config(path).model == CheckpointConfig(checkpoint=str(trained), grid="2x2")
    assert "null: tiny" in path.read_text()


@pytest.mark.parametrize("name", MODELS)
def test_every_model_on_the_cpu(data: Path, tmp_path: Path, name: str) -> None:
    assert init(tmp_path, "--data", data, "--model", name, "--gpus", 0, "--grid", "3x3") == 0
    config = load_config(tmp_path / "config.yaml")
    assert isinstance(config.model, ModelConfig)
    assert config.model.grid == "3x3"
    assert (config.model.template, config.stage1.template) == (load_config(shipped(name)).model.template, "plain")
    assert (config.stage2.lora, config.stage2.deepspeed, config.precision) == (None, None, "fp32")
    assert config.stage2.capacity == config.stage2.max_length == 7168, "ten tiles of 576 tokens and a conversation"


def test_one_small_gpu_gets_adapters(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--data", data, "--model", "vicuna-7b", "--gpus", 1, "--grid", "2x2")
    assert init(tmp_path, *arguments, "--memory-gb", 24) == 0
    stage = load_config(tmp_path / "config.yaml").stage2
    assert stage.lora is not None
    assert (stage.lora.rank, stage.vision_lr, stage.deepspeed) == (64, None, None)
    capsys.readouterr()
    assert init(tmp_path / "smaller", *arguments, "--memory-gb", 8) == 2
    assert "stage1 does not fit on 1 x 8 GB" in capsys.readouterr().err
    assert not (tmp_path / "smaller").exists()


def shipped(name: str) -> Path:
    return Path(__file__).parents[2] / "configs" / f"{MODELS[name]}.yaml"


def test_questions_are_answered_line_by_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{data}\n\n2\nvicuna-7b\n3x2\n48\n"))
    assert init(tmp_path) == 0
    config = load_config(tmp_path / "config.yaml")
    assert isinstance(config.model, ModelConfig)
    assert (config.model.llm, config.model.grid) == ("lmsys/vicuna-7b-v1.5", "3x2")
    assert config.stage2.packs_per_step == 2, "one pack per GPU for 12 records"
    said = capsys.readouterr()
    assert "torchrun --nproc-per-node 2 -m anyres_vlm train" in said.out
    assert "conversations" in said.err
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{data}\n"))
    assert init(tmp_path / "other") == 2
    assert "no answer to --images: give it, or --yes" in capsys.readouterr().err


def test_several_sources_with_an_image_folder(data: Path, tmp_path: Path) -> None:
    (tmp_path / "apart").mkdir()
    moved = tmp_path / "apart" / "moved.json"
    moved.write_text(data.read_text())
    flags = ("--data", moved, "--data", data, "--images", data.parent, "--yes", "--model", "tiny")
    assert init(tmp_path / "mine", *flags) == 0
    source = open_source(tmp_path / "mine" / "mixture.yaml")
    assert len(source) == 24
    assert source.record(0).id == f"moved/{json.loads(data.read_text())[0]['id']}"


def test_nothing_is_overwritten_and_mistakes_are_named(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mixture.yaml").write_text("mine")
    assert init(tmp_path, "--data", data, "--yes", "--model", "tiny") == 2
    assert "is not overwritten" in capsys.readouterr().err
    assert (tmp_path / "mixture.yaml").read_text() == "mine"
    assert not (tmp_path / "config.yaml").exists()
    apart = tmp_path / "apart.json"
    apart.write_text(data.read_text().replace("images/", "nowhere/"))
    for flags, status, message in (
        (("--yes",), 2, "give --data PATH"),
        (("--yes", "--data", data, "--model", "vicuna7b"), 2, "did you mean vicuna-7b?"),
        (("--yes", "--data", data, "--grid", "2by2"), 2, "expected ROWSxCOLUMNS"),
        (("--yes", "--data", tmp_path / "none.json"), 1, "no such file"),
        (("--yes", "--data", tmp_path / "mixture.yaml"), 2, "already a mixture"),
        (("--yes", "--data", data, "--images", tmp_path), 1, "see --images"),
    ):
        assert init(tmp_path / "new", *flags) == status
        assert message in capsys.readouterr().err
        assert not (tmp_path / "new").exists()


def test_small_data_has_small_batches() -> None:
    assert [fitting_batch(128, samples) for samples in (3, 500, 6400, 1_000_000)] == [8, 10, 128, 128]
