"""`anyres rehearse` is green on replicas of the shipped configs' bases, and red on what only a run shows."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from replicas import (
    CLIP,
    FACTS,
    LLAMA_3,
    MISTRAL,
    SMOLLM2,
    VICUNA_7B,
    VICUNA_13B,
    YI,
    Size as ReplicaSize,
    build_replica,
)

from anyres_vlm.cli.main import main
from anyres_vlm.config import load_config, shipped_config
from anyres_vlm.synthetic.dataset import write_dataset

BASES = {
    "llava15_7b": VICUNA_7B,
    "llava_next_vicuna_7b": VICUNA_7B,
    "llava_next_13b": VICUNA_13B,
    "llava_next_mistral_7b": MISTRAL,
    "llava_next_llama3_8b": LLAMA_3,
    "llava_next_34b": YI,
    "smollm2_135m": SMOLLM2,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), "instructions", 60, 0)


def bases(config: str, folder: Path, size: ReplicaSize) -> list[str]:
    """Settings that name replicas of the config's own bases."""
    if config == "tiny":
        return []
    llm = build_replica(BASES[config], folder / "llm", size)
    if size == "real":  # it comes without weights, which the rehearsal does not read
        (llm / ("pytorch_model.bin" if FACTS[BASES[config]].weights == "bin" else "model.safetensors")).touch()
    settings = [f"model.llm={llm}"]
    if config == "smollm2_135m":
        return [*settings, "model.encoder.name=vit_small_patch14_dinov2"]
    clip = build_replica(CLIP, folder / "clip", size)
    if size == "real":
        (clip / "pytorch_model.bin").touch()
    return [*settings, f"model.encoder.name={clip}"]


def rehearse(config: str, folder: Path, size: ReplicaSize, *words: object, settings: tuple[str, ...] = ()) -> int:
    sets = [word for setting in (*bases(config, folder, size), *settings) for word in ("--set", setting)]
    path = shipped_config(config)
    return main(["rehearse", "--config", str(path), "--output", str(folder / "run"), *map(str, words), *sets])


def lines(out: str) -> dict[str, str]:
    """The table's lines by the first word of the step; the last of each."""
    return {line[6:20].strip(): line for line in out.splitlines() if line[:5].strip() in ("ok", "warn", "fail")}


@pytest.fixture
def much_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoints of the real models would not fit a test machine."""
    usage = shutil.disk_usage("/")._replace(free=10**14)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)


@pytest.mark.slow
def test_two_ranks_under_deepspeed(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], much_disk: None
) -> None:
    """A small replica of Vicuna with the templates, precision and ranks of the recipe, and both kinds of ZeRO."""
    assert rehearse("llava_next_vicuna_7b", tmp_path, "tiny", "--data", data, "--set", "stage2.deepspeed=zero3") == 0, (
        capsys.readouterr().out
    )
    table = lines(capsys.readouterr().out)
    assert "on 2 x CPU (stage1 zero2, stage2 zero3), then killed" in table["train"]
    assert "after step 3; 2 repeated steps have the same loss" in table["resume"]
    assert "equal those of stock transformers" in table["answers"]
    assert "a stock LlavaNext folder" in table["export"]
    assert "library_name" in table["model card"]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("config", [*BASES, "tiny"])
def test_every_shipped_config_is_green(
    config: str, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], much_disk: None
) -> None:
    """Configurations and tokenizers of the real sizes."""
    words = () if config == "tiny" else ("--data", data)
    status = rehearse(config, tmp_path, "real", *words)
    out = capsys.readouterr().out
    assert status == 0, out
    assert {"train", "resume", "answers", "export", "model card"} <= lines(out).keys()


def test_a_terminated_rehearsal_leaves_no_process_and_no_file(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "anyres_vlm", "rehearse", "--output", str(tmp_path / "run")]
    rehearsal = subprocess.Popen(command, env={**os.environ, "TMPDIR": str(tmp_path)}, stderr=subprocess.DEVNULL)
    while rehearsal.poll() is None and not any(tmp_path.glob("anyres-rehearse-*/run/stage1")):
        time.sleep(0.1)
    rehearsal.terminate()
    assert rehearsal.wait(timeout=60) == 128 + signal.SIGTERM
    assert not any(tmp_path.glob("anyres-rehearse-*"))
    processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path / "anyres-rehearse-") not in processes


def test_every_config_with_a_model_is_tried() -> None:
    shipped = {path.stem for path in shipped_config("tiny").parent.glob("*.yaml") if "\nmodel:\n" in path.read_text()}
    assert shipped == {*BASES, "tiny"}


@pytest.mark.slow
def test_what_only_the_training_shows(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], much_disk: None
) -> None:
    """A feature cache does not work with ZeRO-3; the base's sliding window is shorter than the longest sample."""
    cached = (f"cache_features={json.dumps({'folder': str(tmp_path / 'features')})}", "stage2.vision_lr=null")
    assert rehearse("llava_next_vicuna_7b", tmp_path / "one", "tiny", "--data", data, settings=cached) == 1
    assert "would stop the run: train: " in (out := capsys.readouterr().out)
    assert "cache_features" in out
    folder = tmp_path / "two"
    llm = build_replica(MISTRAL, folder / "other")
    content = json.loads((llm / "config.json").read_text())
    (llm / "config.json").write_text(json.dumps(content | {"sliding_window": 16}))
    settings = (f"model.llm={llm}", "model.template=mistral")
    assert rehearse("llava_next_vicuna_7b", folder, "tiny", "--data", data, settings=settings) == 1
    assert re.search("would stop the run: train: .*the last 16 only", capsys.readouterr().out)


@pytest.mark.slow
def test_without_data_records_are_rendered(tmp_path: Path, capsys: pytest.CaptureFixture[str], much_disk: None) -> None:
    """The missing file is the one fault; everything else is still tried."""
    assert load_config(shipped_config("llava15_7b")).stage1.data.path is not None
    assert rehearse("llava15_7b", tmp_path, "tiny") == 1
    out = capsys.readouterr().out
    assert [line.split(": ")[1] for line in out.splitlines() if line.startswith("would stop")] == [
        "stage1 data",
        "stage2 data",
    ]
    assert "ok    resume" in out
    assert "only the thumbnail" in lines(out)["export"]
