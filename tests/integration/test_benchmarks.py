"""`anyres eval` on official files of all five benchmarks: a trained checkpoint, kills, shards, and what is missing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import benchmark_files
import pytest
from accelerate.state import AcceleratorState
from judge_server import requests, serving

from anyres_vlm.cli.main import main
from anyres_vlm.config import load_config, shipped_config
from anyres_vlm.train.options import RunOptions
from anyres_vlm.train.run import train


@pytest.fixture(scope="module")
def checkpoint(tiny_bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of stage 2."""
    AcceleratorState._reset_state(reset_partial_state=True)
    sets = {
        "model.llm": tiny_bases / "llm",
        "model.encoder.name": tiny_bases / "vit",
        "stage2.data.samples": 16,
        "stage2.capacity": 1024,
        "stage2.packs_per_step": 2,
    }
    config = load_config(shipped_config("tiny"), [f"{key}={value}" for key, value in sets.items()])
    output = tmp_path_factory.mktemp("trained")
    train(config, RunOptions(output, ("stage2",), max_steps=2, skip_stage1=True), lambda *step: None)
    return output / "stage2" / "model"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return benchmark_files.write_all(tmp_path_factory.mktemp("official"))


@pytest.fixture
def endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with serving(["0.5"], tmp_path / "requests.jsonl") as url:
        yield url


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_all_five(checkpoint: Path, data: Path, endpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    arguments = ["eval", "vqav2", "gqa", "textvqa", "pope", "mmvet", "--model", str(checkpoint), "--data", str(data)]
    arguments += ["--out", str(out), "--ocr-tokens", "--judge", "gpt-x", "--judge-url", endpoint, "--json"]
    assert main(arguments) == 0
    results = json.loads(capsys.readouterr().out)
    assert {name: result["questions"] for name, result in results.items()} == {
        "vqav2": 6, "gqa": 5, "textvqa": 4, "pope": 12, "mmvet": 3,
    }  # fmt: skip
    for name, result in results.items():
        kept = json.loads((out / f"{name}.json").read_text())
        assert len(kept.pop("points")) == result["questions"]
        assert kept == result

    asked = {name: lines(out / f"{name}.answers.jsonl") for name in results}
    short = "\nAnswer the question using a single word or phrase."
    assert asked["vqav2"][0].items() >= {"question_id": 4000, "prompt": f"What is 0?{short}"}.items()
    assert asked["gqa"][1].items() >= {"question_id": "201", "prompt": f"Is number 1 there?{short}"}.items()
    ocr = f"What does sign 0 say?\nReference OCR token: BAK, ERY,{short}"
    assert asked["textvqa"][0].items() >= {"question_id": 34602, "prompt": ocr}.items()
    assert [line["question_id"] for line in asked["pope"][3:6]] == [4, 20_000_001, 20_000_002]
    assert asked["mmvet"][2].items() >= {"question_id": "v1_2", "prompt": "What is 2?"}.items()
    assert any(line["text"] for line in asked["pope"]), "the checkpoint says something"

    assert list(json.loads((out / "vqav2.submission.json").read_text())[0]) == ["question_id", "answer"]
    assert list(json.loads((out / "gqa.submission.json").read_text())[0]) == ["questionId", "prediction"]
    assert list(json.loads((out / "textvqa.submission.json").read_text())[0]) == ["question_id", "answer"]
    assert {line["answer"] for line in lines(out / "pope.submission.jsonl")} <= {"yes", "no"}
    assert list(json.loads((out / "mmvet.submission.json").read_text())) == ["v1_0", "v1_1", "v1_2"]

    assert results["textvqa"]["protocol"]["ocr_tokens"] == "in the prompt (Rosetta)"
    assert list(results["pope"]["scores"]) == ["adversarial", "popular", "random"]
    assert results["mmvet"]["scores"] == {
        "total": 50.0,
        "capabilities": {"math": 50.0, "ocr": 50.0, "rec": 50.0},
        "integrations": {"math_ocr": 50.0, "ocr": 50.0, "ocr_rec": 50.0},
        "judged_by": ["gpt-x-0613"],
    }
    # Again: nothing is generated and nothing judged, every file is the same.
    before = {path: path.read_bytes() for path in out.iterdir()}
    graded = len(requests(tmp_path / "requests.jsonl"))
    assert graded == 3
    (out / "gqa.json").unlink()
    assert main(arguments) == 0
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert len(requests(tmp_path / "requests.jsonl")) == graded
    # The same scores from the answer files alone.
    for name, official in {
        "vqav2": "v2_mscoco_val2014_annotations.json",
        "gqa": "testdev_balanced_questions.json",
        "textvqa": "TextVQA_0.5.1_val.json",
        "pope": "coco",
    }.items():
        capsys.readouterr()
        given, official_file = out / f"{name}.answers.jsonl", data / name / official
        arguments = ["score", name, "--answers", str(given), "--annotations", str(official_file), "--json"]
        assert main([*arguments, "--out", str(tmp_path / "scored")]) == 0
        assert json.loads(capsys.readouterr().out)["scores"] == results[name]["scores"]
        marks = [(folder / f"{name}.marks.jsonl").read_bytes() for folder in (out, tmp_path / "scored")]
        assert marks[0] == marks[1]
    # All of it on one page.
    runs = [str(out), str(tmp_path / "scored")]
    assert main(["report", *runs, "--out", str(tmp_path / "report.html"), "--examples", "2"]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "scored less out: +0.0 points" in page
    assert "judge gpt-x-0613; published scores are" in page
    assert page.count("data:image/jpeg") >= 10
    assert "no picture: " not in page


def ask(checkpoint: Path, data: Path, out: Path, *more: str) -> list[str]:
    return ["eval", "pope", "--model", str(checkpoint), "--data", str(data / "pope"), "--out", str(out), *more]


def read(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in ("pope.answers.jsonl", "pope.json", "pope.submission.jsonl")}


def test_a_killed_run_goes_on_to_the_same_files(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    one_at_a_time = ("--batch-tokens", "1", "--limit", "2")
    assert main(ask(checkpoint, data, tmp_path / "whole", *one_at_a_time)) == 0
    out, log = tmp_path / "killed", tmp_path / "killed" / "pope.log.1-of-1.jsonl"
    command = [sys.executable, "-m", "anyres_vlm", *ask(checkpoint, data, out, *one_at_a_time)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    while not log.exists() or log.read_bytes().count(b"\n") < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    answered = log.read_bytes().count(b"\n") - 1
    assert 2 <= answered < 6
    assert not (out / "pope.json").exists()
    with log.open("ab") as file:  # as if the kill had cut a line
        file.write(b'{"answers": [[5, "ye')
    kept = log.read_bytes()[: -len(b'{"answers": [[5, "ye')]
    assert main(ask(checkpoint, data, out, *one_at_a_time)) == 0
    assert log.read_bytes().startswith(kept), "what had been answered was not asked again"
    assert log.read_bytes().count(b"\n") == 7
    assert read(out) == read(tmp_path / "whole")


def test_any_number_of_shards_gives_the_same_files(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(ask(checkpoint, data, tmp_path / "whole")) == 0
    out = tmp_path / "sharded"
    assert main(ask(checkpoint, data, out, "--shard", "3/3")) == 0
    assert "the process that ends last writes" in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "3")  # as torchrun says it
    monkeypatch.setenv("RANK", "0")
    assert main(ask(checkpoint, data, out)) == 0
    assert not (out / "pope.json").exists()
    monkeypatch.setenv("RANK", "1")
    assert main(ask(checkpoint, data, out)) == 0
    assert read(out) == read(tmp_path / "whole")


def test_other_weights_and_other_questions_are_answered_anew(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(ask(checkpoint, data, tmp_path, "--limit", "1")) == 0
    assert json.loads((tmp_path / "pope.json").read_text())["questions"] == 3
    log = tmp_path / "pope.log.1-of-1.jsonl"
    first = log.read_bytes()
    assert main(ask(checkpoint, data, tmp_path, "--limit", "2")) == 0
    assert json.loads((tmp_path / "pope.json").read_text())["scores"]["random"]["accuracy"] in (0.0, 0.5, 1.0)
    second = log.read_bytes()
    assert first.split(b"\n")[0] != second.split(b"\n")[0]
    weights = checkpoint / "model.safetensors"
    os.utime(weights, ns=(1, weights.stat().st_mtime_ns + 1))
    assert main(ask(checkpoint, data, tmp_path, "--limit", "2")) == 0
    assert log.read_bytes().split(b"\n")[0] != second.split(b"\n")[0]
    assert log.read_bytes().split(b"\n")[1:] == second.split(b"\n")[1:]


def test_images_that_are_missing_or_broken(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark_files.pope(tmp_path / "pope")
    pictures = sorted((tmp_path / "pope" / "val2014").iterdir())
    pictures[1].unlink()
    assert main(ask(checkpoint, tmp_path, tmp_path / "out")) == 1
    said = capsys.readouterr().err
    assert "images of 6 of 12 questions are missing or broken (question 1: " in said
    assert "no such file" in said
    whole = pictures[2].read_bytes()
    pictures[1].write_bytes(whole)
    pictures[2].write_bytes(whole[: len(whole) * 2 // 3])  # its header is whole
    assert main(ask(checkpoint, tmp_path, tmp_path / "out", "--batch-tokens", "1")) == 1
    said = capsys.readouterr().err
    assert "pope: images of 3 of 12 questions are missing or broken (question 2: " in said
    pictures[2].write_bytes(whole)
    assert main(ask(checkpoint, tmp_path, tmp_path / "out")) == 0


def test_questions_that_cannot_be_asked(checkpoint, tmp_path, capsys, caplog, monkeypatch) -> None:
    benchmark_files.gqa(tmp_path)
    path = tmp_path / "testdev_balanced_questions.json"
    entries = json.loads(path.read_text())
    entries["203"]["question"] = "why? " * 3000
    path.write_text(json.dumps(entries))
    arguments = [
        "eval",
        "gqa",
        "--model",
        str(checkpoint),
        "--data",
        str(path),
        "--out",
        str(tmp_path / "out"),
        "--json",
    ]
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert "gqa: 1 questions cannot be asked (203; see the warnings), at most 1% may: the prompt has" in said
    assert "question 203 is answered with an empty text: the prompt has" in caplog.text
    monkeypatch.setattr("anyres_vlm.evaluate.runner.MAX_UNASKED", 0.2)
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["gqa"]["unasked"] == ["203"]
    assert lines(tmp_path / "out" / "gqa.answers.jsonl")[3]["text"] == ""


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["textvqa"], 2, "choose --ocr-tokens or --no-ocr-tokens"),
        (["heldout", "gqa"], 2, "heldout is scored alone"),
        (["gqa", "--swap-images"], 2, "--swap-images and --against are heldout's"),
        (["gqa", "--shard", "3/2"], 2, "shard '3/2'"),
        (["vqav2", "--data", "nowhere"], 1, "nowhere: no such file or folder; expected VQAv2 questions"),
        (["gqa", "--model", "nowhere"], 2, "nowhere: results go beside a checkpoint folder"),
        (["mmvet", "--judge-url", "http://x"], 2, "need --judge"),
    ],
)
def test_mistakes_are_one_line(checkpoint, data, tmp_path, capsys, arguments, status, words) -> None:
    given = ["eval", "--model", str(checkpoint), "--data", str(data), *arguments]
    assert main(given) == status
    said = capsys.readouterr().err.strip()
    assert words in said
    assert "\n" not in said


def test_without_answers_or_judge_there_is_a_submission(checkpoint, data, tmp_path, capsys) -> None:
    (tmp_path / "data").mkdir()
    questions = json.loads((data / "vqav2" / "v2_OpenEnded_mscoco_val2014_questions.json").read_text())
    questions["data_subtype"] = "test-dev2015"
    file = tmp_path / "data" / "v2_OpenEnded_mscoco_test-dev2015_questions.json"
    benchmark_files.write(file, questions | {"questions": questions["questions"][:2]})
    benchmark_files.draw(tmp_path / "data" / "test2015", [f"COCO_test2015_{40 + n:012d}.jpg" for n in range(2)])
    arguments = ["eval", "vqav2", "mmvet", "--model", str(checkpoint), "--data", str(tmp_path / "data")]
    benchmark_files.mmvet(tmp_path / "data" / "mmvet")
    assert main([*arguments, "--out", str(tmp_path), "--limit", "1"]) == 0
    assert capsys.readouterr().out.count("no score") == 2
    assert len(json.loads((tmp_path / "vqav2.submission.json").read_text())) == 1
    whole = file.with_name("v2_OpenEnded_mscoco_test2015_questions.json")
    benchmark_files.write(whole, questions | {"data_subtype": "test2015"})
    arguments = ["eval", "vqav2", "--model", str(checkpoint), "--data", str(file), "--out", str(tmp_path)]
    assert main([*arguments, "--limit", "1"]) == 0
    sent = json.loads((tmp_path / "vqav2.submission.json").read_text())
    assert [entry["question_id"] for entry in sent] == list(range(4000, 4006))
    assert [entry["answer"] for entry in sent[1:]] == [""] * 5, "the server wants the whole test set"
    assert json.loads((tmp_path / "mmvet.json").read_text())["score"] is None
