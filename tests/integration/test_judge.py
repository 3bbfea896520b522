"""The judge against a real server: what it asks, what it bears, what it keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from judge_server import requests, serving

from anyres_vlm.cli.main import main
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.evaluate.benchmarks.mmvet import Grade, Judge

INSTRUCTIONS = "Grade.\n"


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")


def graded(folder: Path, script: list[Any], answer: str = "x = -1", timeout_s: float = 20.0) -> Grade:
    with serving(script, folder / "log.jsonl") as url:
        judge = Judge("gpt-x", INSTRUCTIONS, folder / "grades.jsonl", url, timeout_s)
        return judge.grade("What is x?", "-1<AND>-5", answer)


def test_the_request(tmp_path: Path) -> None:
    assert graded(tmp_path, ["0.5"]) == Grade(0.5, "0.5", "gpt-x-0613")
    (request,) = requests(tmp_path / "log.jsonl")
    assert request == {
        "path": "/v1/chat/completions",
        "key": "Bearer secret",
        "model": "gpt-x",
        "temperature": 0.0,
        "max_tokens": 3,
        "messages": [{"role": "user", "content": "Grade.\n\nWhat is x? | -1 <AND> -5 | x = -1 | "}],
    }
    assert "secret" not in (tmp_path / "grades.jsonl").read_text()


def test_load_and_faults_are_borne(tmp_path: Path) -> None:
    assert graded(tmp_path, [429, 500, 429, "0.7"]).score == 0.7
    assert len(requests(tmp_path / "log.jsonl")) == 4


def test_an_answer_that_comes_too_late_is_asked_for_again(tmp_path: Path) -> None:
    assert graded(tmp_path, [{"sleep": 30}, "1.0"], timeout_s=2.0).score == 1.0


@pytest.mark.parametrize(
    ("script", "score", "temperatures"),
    [
        (["1.0 right"], 1.0, [0]),
        (["good", "0.3"], 0.3, [0, 0]),
        (["1.5", "-0.1", "nan", "", "0.2"], 0.2, [0, 0, 0.5, 1.0, 1.5]),
        (["no"], 0.0, [0, 0, 0.5, 1.0, 1.5]),
    ],
)
def test_a_grade_that_is_no_number(tmp_path: Path, script: list[Any], score: float, temperatures: list[float]) -> None:
    assert graded(tmp_path, script).score == score
    asked = requests(tmp_path / "log.jsonl")
    assert [request["temperature"] for request in asked] == temperatures
    hints = [request["messages"][0]["content"].endswith("answer (digit): ") for request in asked]
    assert hints == [False] + [True] * (len(asked) - 1)


def test_refused_for_good_keeps_what_is_graded(tmp_path: Path) -> None:
    with serving(["0.4", 401, "0.6"], tmp_path / "log.jsonl") as url:
        judge = Judge("gpt-x", INSTRUCTIONS, tmp_path / "grades.jsonl", url)
        judge.grade("q", "t", "first")
        with pytest.raises(DataError, match=r"AuthenticationError: .*status 401.*: 1 grades are kept in .*grades"):
            judge.grade("q", "t", "second")
        with (tmp_path / "grades.jsonl").open("a") as file:
            file.write('{"key": "cut')
        again = Judge("gpt-x", INSTRUCTIONS, tmp_path / "grades.jsonl", url)
        assert again.grade("q", "t", "first").score == 0.4
        assert again.grade("q", "t", "second").score == 0.6
        assert len(requests(tmp_path / "log.jsonl")) == 3
        other = Judge("gpt-y", INSTRUCTIONS, tmp_path / "grades.jsonl", url)
        assert other.grade("q", "t", "first").model == "gpt-y-0613", "another judge's grades are not its"


def test_the_key_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UsageError, match="OPENAI_API_KEY is not set"):
        Judge("gpt-x", INSTRUCTIONS, tmp_path / "grades.jsonl").grade("q", "t", "a")


def test_score_mmvet_with_the_official_prompt(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    grades = {"v1_0": 0.1, "v1_1": 0.2, "v1_2": 0.0}
    capabilities = {"v1_0": ["ocr", "rec"], "v1_1": ["rec"], "v1_2": ["rec", "ocr"]}
    entries = {
        name: {"imagename": "a.png", "question": f"q {name}", "answer": "t", "capability": capabilities[name]}
        for name in grades
    }
    (tmp_path / "mm-vet.json").write_text(json.dumps(entries))
    answers = [{"question_id": n, "text": f"said {n}"} for n in (2, 0, 1)]  # LLaVA's numbers, in any order
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    (tmp_path / "mm-vet_evaluator.py").write_text('import json\nprompt = """Official words\n"""\nother = 1\n')
    with serving([str(grade) for grade in grades.values()], tmp_path / "log.jsonl") as url:
        command = ["score", "mmvet", "--answers", str(tmp_path / "a.jsonl"), "--annotations"]
        command += [str(tmp_path / "mm-vet.json"), "--judge", "gpt-x", "--judge-url", url]
        command += ["--judge-prompt", str(tmp_path / "mm-vet_evaluator.py"), "--json"]
        assert main(command) == 0
        first = capsys.readouterr().out
        assert main(command) == 0
    assert capsys.readouterr().out == first
    asked = [request["messages"][0]["content"] for request in requests(tmp_path / "log.jsonl")]
    assert asked == [f"Official words\n\nq v1_{n} | t | said {n} | " for n in range(3)]
    result = json.loads(first)
    assert result["scores"] == {
        "total": 10.0,
        "capabilities": {"ocr": 5.0, "rec": 10.0},
        "integrations": {"ocr_rec": 5.0, "rec": 20.0},
        "judged_by": ["gpt-x-0613"],
    }
    assert result["protocol"]["judge"] == "gpt-x"
    assert result["protocol"]["judge_prompt"].startswith("custom")
    assert main([*command[:6], "--json"]) == 2
    assert "name its model with --judge" in capsys.readouterr().err
