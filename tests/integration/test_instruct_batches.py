"""`anyres instruct generate --mode batch` against a real server: every fault, every place where it can be killed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from generation import (
    answered,
    arguments,
    require_whole,
    run_killed,
    run_killed_at_random,
    write_scenes,
)

from anyres_vlm.cli.main import main
from anyres_vlm.instruct import endpoint

ROUTES = ("POST /files", "POST /batches", "GET /batches/ID", "GET /files/ID/content")


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")


def test_batches_with_faults_and_kills(tmp_path: Path, serve: Callable[..., str]) -> None:
    write_scenes(tmp_path, 50)
    url = serve("--faults", "500,expired,nonsense,refusal,length,cut_json,twice", "--rate", 0.3)
    command = arguments(tmp_path, url, "conversation=50,reasoning=30", "--mode", "batch")
    run_killed(command, tmp_path / "out" / "responses.jsonl", kills=1, every=4)  # with its first batch under way
    summary = require_whole(tmp_path, 80)  # no answer is paid and not collected
    assert summary["accepted"] >= 78
    entries = [json.loads(line) for line in (tmp_path / "alone.jsonl").read_text().splitlines()]
    states = Counter(entry["state"] for entry in entries if "batch_name" in entry)
    assert states["submitting"] == states["collected"] > 1
    # half the price of the same tokens
    full = (summary["prompt_tokens"] + 2 * summary["completion_tokens"]) / 1e6
    assert summary["cost"] == pytest.approx(full / 2, abs=1e-6)


def test_a_batch_whose_submission_was_cut_off_is_found_again(tmp_path: Path, serve: Callable[..., str]) -> None:
    write_scenes(tmp_path, 10)
    command = arguments(tmp_path, serve(), "detail=10", "--mode", "batch")
    assert main(command) == 0
    log = tmp_path / "out" / "responses.jsonl"
    kept = [line for line in log.read_text().splitlines() if '"submitted"' not in line and '"key"' not in line]
    assert [json.loads(line).get("state") for line in kept] == [None, None, "submitting", "collected"]
    log.write_text("\n".join(kept[:-1]) + "\n")
    assert main(command) == 0
    require_whole(tmp_path, 10)
    assert answered(tmp_path).total() == 10


@pytest.mark.parametrize(
    ("when", "what"),
    [("before", "drop"), ("before", "429"), *(("after", what) for what in ("drop", "429", "500", "cut", "hang"))],
)
def test_every_route_may_fail_once_on_each_side(
    tmp_path: Path, serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch, when: str, what: str
) -> None:
    monkeypatch.setattr(endpoint, "FIRST_WAIT_S", 0.01)
    write_scenes(tmp_path, 10)
    spoiled = [word for route in ROUTES for word in ("--once", f"{route}:{when}:{what}")]
    command = arguments(tmp_path, serve(*spoiled), "detail=10", "--mode", "batch")
    text = (tmp_path / "settings.yaml").read_text()
    (tmp_path / "settings.yaml").write_text(text.replace("timeout_s: 2", "timeout_s: 0.3"))
    assert main(command) == 0
    assert len((tmp_path / "state" / "spoiled.txt").read_text().splitlines()) == len(ROUTES)
    require_whole(tmp_path, 10)
    assert answered(tmp_path).total() == 10


@pytest.mark.parametrize(
    ("route", "when"),
    [
        ("POST /batches", "before"),
        ("POST /batches", "after"),
        *(
            pytest.param(route, when, marks=pytest.mark.slow)
            for route in ROUTES
            if route != "POST /batches"
            for when in ("before", "after")
        ),
    ],
)
def test_a_kill_during_any_request_pays_nothing_twice(
    tmp_path: Path, serve: Callable[..., str], route: str, when: str
) -> None:
    write_scenes(tmp_path, 10)
    command = arguments(tmp_path, serve("--once", f"{route}:{when}:hang"), "detail=10", "--mode", "batch")
    (tmp_path / "settings.yaml").write_text((tmp_path / "settings.yaml").read_text().replace("timeout_s: 2, ", ""))
    process = subprocess.Popen([sys.executable, "-m", "anyres_vlm", *command])
    while not (tmp_path / "state" / "spoiled.txt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert main(command) == 0
    require_whole(tmp_path, 10)
    assert answered(tmp_path).total() == 10


def test_a_batch_that_is_listed_late_is_waited_for(tmp_path: Path, serve: Callable[..., str]) -> None:
    write_scenes(tmp_path, 10)
    command = arguments(tmp_path, serve("--once", "GET /batches:before:empty"), "detail=10", "--mode", "batch")
    assert main(command) == 0
    log = tmp_path / "out" / "responses.jsonl"
    log.write_text("".join(f"{line}\n" for line in log.read_text().splitlines()[:3]))
    assert json.loads(log.read_text().splitlines()[-1])["state"] == "submitting"
    assert main([word for word in command if word not in ("--mode", "batch")]) == 2  # would pay for it again
    assert main(command) == 0
    require_whole(tmp_path, 10)
    assert answered(tmp_path).total() == 10


@pytest.mark.slow
def test_kills_of_batches_at_random_moments(tmp_path: Path, serve: Callable[..., str]) -> None:
    write_scenes(tmp_path, 200)
    url = serve("--faults", "500,expired,nonsense,refusal,length,cut_json,twice", "--rate", 0.3)
    command = arguments(tmp_path, url, "conversation=200,reasoning=200", "--mode", "batch")
    assert run_killed_at_random(tmp_path, command, kills=10, longest_s=0.3) >= 5
    assert require_whole(tmp_path, 400)["accepted"] >= 396
