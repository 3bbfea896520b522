"""Commands that need no model do not import torch, which takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from anyres_vlm.cli.main import main
from anyres_vlm.config import shipped_config

SCRIPT = "import sys; from anyres_vlm.cli.main import main; status = main(sys.argv[1:]); print('torch' in sys.modules)"


def loads_torch(*words: object) -> bool:
    command = [sys.executable, "-c", f"{SCRIPT}; sys.exit(status)", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1] == "True"


def test_score_and_report(tmp_path: Path) -> None:
    label = {"question_id": 1, "image": "a.jpg", "text": "Is there a cat?", "label": "yes"}
    (tmp_path / "coco_pope_random.json").write_text(json.dumps([label, label | {"question_id": 2, "label": "no"}]))
    (tmp_path / "answers.json").write_text(json.dumps([{"question_id": n, "text": "Yes"} for n in (1, 2)]))
    score = ["score", "pope", "--answers", tmp_path / "answers.json", "--out", tmp_path / "out"]
    assert not loads_torch(*score, "--annotations", tmp_path / "coco_pope_random.json")
    replies = {"counting": [{"question": "?", "answer": "1", "facts": {"count": 1}, "said": "1"}] * 2}
    scores = {"counting": {"1": {"accuracy": 1.0}, "all": {"accuracy": 1.0}}}
    probes = {"model": "m", "count": 2, "seed": 0, "scores": scores, "replies": replies}
    (tmp_path / "out" / "probes.json").write_text(json.dumps(probes))
    assert not loads_torch("report", tmp_path / "out", "--out", tmp_path / "r.html")
    assert "objects counted correctly" in (tmp_path / "r.html").read_text()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    assert main(["render", str(folder), "--count", "12"]) == 0
    return folder / "data.json"


def test_index_and_plan(tmp_path: Path, data: Path) -> None:
    index = tmp_path / "index.parquet"
    assert not loads_torch("index", data, "--out", index, "--workers", 1)
    assert not loads_torch("plan", index, "--ranks", 1, "--batch-size", 4, "--capacity", 4096, "--out", tmp_path / "p")


def test_index_for_a_checkpoint(tmp_path: Path, data: Path, checkpoint: Path) -> None:
    settings = yaml.safe_load(shipped_config("tiny").read_text()) | {"model": {"checkpoint": str(checkpoint)}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    assert not loads_torch(
        "index", data, "--config", tmp_path / "config.yaml", "--out", tmp_path / "index.parquet", "--workers", 1
    )


def test_init_for_the_cpu(tmp_path: Path, data: Path) -> None:
    assert not loads_torch("init", tmp_path, "--data", data, "--model", "tiny", "--gpus", 0, "--yes")
