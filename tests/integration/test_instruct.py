"""`anyres instruct` against a real server process that answers well, badly, late or not at all."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from generation import (
    CONCURRENCY,
    answered,
    arguments,
    logged,
    require_whole,
    run_killed,
    run_killed_at_random,
    write_scenes,
)
from PIL import Image

from anyres_vlm.cli.main import main
from anyres_vlm.data.sources import read_records
from anyres_vlm.instruct import generate
from anyres_vlm.instruct.log import Ledger

KEY = "sk-test-0123456789-secret"
EVERY_FAULT = "slow,429,500,drop,drop_body,cut_json,nonsense,refusal,refusal_field,length"


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.mark.parametrize(
    ("counts", "rate", "kills", "spared"),
    [
        # Six attempts, of which each is spoiled with 0.5 * 5 / 10: 0.02 of 100 items use them up. Each kind of fault
        # comes 6 times, so that no kill takes the last of a kind.
        ((40, 30, 30), 0.5, 2, 98),
        pytest.param((800, 500, 700), 0.2, 3, 1998, marks=pytest.mark.slow),
    ],
)
def test_faults_and_kills_lose_and_double_nothing(
    tmp_path: Path, serve: Callable[..., str], counts: tuple[int, int, int], rate: float, kills: int, spared: int
) -> None:
    write_scenes(tmp_path, max(counts))
    url = serve("--faults", EVERY_FAULT, "--rate", rate, "--delay", 0.02)  # else it may end between two looks
    command = arguments(tmp_path, url, "conversation={},detail={},reasoning={}".format(*counts))
    run_killed(command, tmp_path / "out" / "responses.jsonl", kills, every=sum(counts) // (kills + 1))
    summary = require_whole(tmp_path, sum(counts), resent=kills * CONCURRENCY)
    assert summary["accepted"] >= spared
    assert {"broken_response", "malformed", "refusal", "cut_short"} <= set(summary["failed_attempts"])


@pytest.mark.slow
def test_kills_at_random_moments(tmp_path: Path, serve: Callable[..., str]) -> None:
    write_scenes(tmp_path, 300)
    url = serve("--faults", EVERY_FAULT, "--rate", 0.2, "--delay", 0.05)
    command = arguments(tmp_path, url, "conversation=300,detail=300,reasoning=300")
    killed = run_killed_at_random(tmp_path, command, kills=10, longest_s=0.5)
    assert killed >= 8
    assert require_whole(tmp_path, 900, resent=killed * CONCURRENCY)["accepted"] >= 896


def test_output_trains(tmp_path: Path, tiny_bases: Path, serve: Callable[..., str]) -> None:
    write_scenes(tmp_path, 30)
    for number in range(30):
        Image.new("RGB", (60, 40), (number, 90, 200)).save(tmp_path / f"{number}.png")
    assert main(arguments(tmp_path, serve(), "conversation=20,detail=10,reasoning=10", "--images", tmp_path)) == 0
    data = tmp_path / "out" / "data.json"
    assert len(read_records(data, tmp_path)) == 40
    index = tmp_path / "i.parquet"
    overrides = [f"model.llm={tiny_bases}/llm", f"model.encoder.name={tiny_bases}/vit", "save_every=2"]
    for stage in ("stage1", "stage2"):
        overrides += [f"{stage}.max_length=2048", f"{stage}.capacity=2048", f"{stage}.packs_per_step=4"]
    overrides += [f"stage2.data={{path: {data}, images: {tmp_path}, index: {index}}}"]
    flags = [word for override in overrides for word in ("--set", override)]
    assert main(["index", str(data), "--images", str(tmp_path), "--out", str(index), *flags]) == 0
    assert main(["plan", str(index), "--capacity", "2048", "--batch-size", "16", "--ranks", "1"]) == 0
    assert main(["train", "--stage", "2", "--skip-stage1", "--output", str(tmp_path / "run"), *flags]) == 0
    steps = [json.loads(line) for line in (tmp_path / "run" / "stage2" / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    assert sum(step["data/samples"] for step in steps) == 40
    assert (tmp_path / "run" / "stage2" / "model" / "model.safetensors").exists()
    assert "data:image/jpeg;base64," in (tmp_path / "out" / "report.html").read_text()


def test_the_key_is_written_nowhere(
    tmp_path: Path, serve: Callable[..., str], capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    write_scenes(tmp_path, 3)
    assert main(["--debug", *arguments(tmp_path, serve("--faults", "401"), "detail=3")]) == 2
    printed = capfd.readouterr()
    assert "error: the endpoint refuses" in printed.err
    assert "Incorrect API key: [key]" in printed.err
    assert f"Bearer {KEY}" in (tmp_path / "state" / "headers.txt").read_text()  # it was sent
    for folder, _, names in os.walk(tmp_path / "out"):
        assert not [name for name in names if KEY in (Path(folder) / name).read_text()]
    assert KEY not in printed.out + printed.err + caplog.text


@pytest.mark.parametrize("mode", ["sync", "batch"])
def test_a_placeholder_for_a_key_changes_no_answer(
    tmp_path: Path, serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "river")  # a word of the server's
    write_scenes(tmp_path, 10)
    assert main(arguments(tmp_path, serve(), "detail=10", "--mode", mode)) == 0
    data = (tmp_path / "out" / "data.json").read_text()
    assert "[key]" not in data
    assert "river" in data


@pytest.mark.parametrize(
    ("fault", "status", "said"),
    [
        ("wait_a_day", 1, "asks to wait 86,400 s"),
        ("500", 1, r"25 requests in a row failed, the last with: HTTP 500"),
        ("400", 1, r"25 requests in a row failed, the last with: HTTP 400"),
    ],
)
def test_a_useless_endpoint_ends_the_run(
    tmp_path: Path, serve: Callable[..., str], capfd: pytest.CaptureFixture[str], fault: str, status: int, said: str
) -> None:
    write_scenes(tmp_path, 90)
    assert main(arguments(tmp_path, serve("--faults", fault), "detail=90", retries=0)) == status
    assert re.search(said, capfd.readouterr().err)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["items"] == 90 == summary["rejected"] + summary["unfinished"]


def test_a_hanging_endpoint_times_out_and_is_asked_again(tmp_path: Path, serve: Callable[..., str]) -> None:
    write_scenes(tmp_path, 8)
    url = serve("--faults", "hang", "--rate", 0.4)
    config = arguments(tmp_path, url, "detail=8")
    (tmp_path / "settings.yaml").write_text("model: m\nlimits: {timeout_s: 0.5, retries: 12}\n")
    assert main(config) == 0
    require_whole(tmp_path, 8)


def test_a_429_holds_every_request_back_for_as_long_as_it_says(tmp_path: Path, serve: Callable[..., str]) -> None:
    write_scenes(tmp_path, 20)
    url = serve("--once", "POST /chat/completions:before:later", "--delay", 0.1)
    assert main(arguments(tmp_path, url, "detail=20", "--concurrency", 2)) == 0
    (_, _, refused_at) = (tmp_path / "state" / "spoiled.txt").read_text().split()
    times = [json.loads(line)["at"] for line in (tmp_path / "state" / "answered.jsonl").read_text().splitlines()]
    under_way = [at for at in times if at < float(refused_at) + 1.5]
    assert len(times) == 20
    assert len(under_way) <= 1


def test_progress_says_time_left_and_cost(
    tmp_path: Path, serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generate, "LINE_EVERY_S", 0.2)
    write_scenes(tmp_path, 30)
    assert main(arguments(tmp_path, serve("--delay", 0.1), "detail=30", "--concurrency", 3)) == 0
    lines = re.findall(r"generating (\d+)/30  (\d+) s left  [\d,]+ tokens  \$0\.0\d", capfd.readouterr().err)
    assert len(lines) >= 2
    settled, left_s = zip(*((int(done), int(left)) for done, left in lines), strict=True)
    assert list(settled) == sorted(settled)
    assert all(left <= 30 for left in left_s)


def test_the_first_progress_may_come_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A raw log of many responses takes long to read."""
    monkeypatch.setattr(generate, "LINE_EVERY_S", 0.01)
    with generate.show_progress() as progress:
        time.sleep(0.02)
        progress(5, 10, Ledger())


def test_concurrency_is_bounded(tmp_path: Path, serve: Callable[..., str]) -> None:
    write_scenes(tmp_path, 40)
    url = serve("--delay", 0.05)
    assert main(arguments(tmp_path, url, "detail=40", "--concurrency", 5)) == 0
    with urllib.request.urlopen(f"{url}/stats") as reply:
        assert json.load(reply)["most_under_way"] == 5


def test_a_signal_ends_the_run_after_what_is_under_way(tmp_path: Path, serve: Callable[..., str]) -> None:
    write_scenes(tmp_path, 400)
    command = arguments(tmp_path, serve("--delay", 0.1), "detail=400")
    process = subprocess.Popen([sys.executable, "-m", "anyres_vlm", *command], stderr=subprocess.PIPE, text=True)
    log = tmp_path / "out" / "responses.jsonl"
    while not log.exists() or log.read_bytes().count(b"\n") < 30:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 75
    assert "interrupted: SIGTERM received" in said
    assert len(logged(tmp_path)) == answered(tmp_path).total() < 400
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["accepted"] == len(logged(tmp_path)) == 400 - summary["unfinished"]


def test_a_signal_does_not_wait_for_a_rate_or_a_retry(tmp_path: Path, serve: Callable[..., str]) -> None:
    write_scenes(tmp_path, 40)
    command = arguments(tmp_path, serve("--faults", "500", "--rate", 0.5), "detail=40")
    limits = f"limits: {{requests_per_minute: 60, retries: 9, concurrency: {CONCURRENCY}}}"
    (tmp_path / "settings.yaml").write_text(f"model: m\n{limits}\n")
    process = subprocess.Popen([sys.executable, "-m", "anyres_vlm", *command])
    log = tmp_path / "out" / "responses.jsonl"
    while not log.exists() or log.read_bytes().count(b"\n") < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=8) == 75  # the queue alone would take half a minute
    assert len(logged(tmp_path)) == answered(tmp_path).total()


def test_budgets_are_never_passed(tmp_path: Path, serve: Callable[..., str], capfd: pytest.CaptureFixture[str]) -> None:
    write_scenes(tmp_path, 60)
    url = serve()
    assert main(arguments(tmp_path, url, "detail=60", "--max-tokens", 15000)) == 0
    assert "stopped:  the budget is used up" in capfd.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    tokens = summary["prompt_tokens"] + summary["completion_tokens"]
    assert 12400 < tokens <= 15000  # short of it by less than the highest cost of one answer, 2,500
    assert main(arguments(tmp_path, url, "detail=60", "--max-cost", 0.025, "--json")) == 0
    summary = json.loads(capfd.readouterr().out)
    assert 0.0214 < summary["cost"] <= 0.025
    # the server's own count, at 1 and 2 dollars a million
    usages = [json.loads(entry["body"])["usage"] for entry in logged(tmp_path)]
    cost = sum(usage["prompt_tokens"] + 2 * usage["completion_tokens"] for usage in usages) / 1e6
    assert summary["cost"] == pytest.approx(cost, abs=1e-6)


def test_budgets_hold_with_the_most_expensive_tokenizer_and_the_longest_answers(
    tmp_path: Path, serve: Callable[..., str]
) -> None:
    write_scenes(tmp_path, 40)
    scenes = [json.loads(line) for line in (tmp_path / "scenes.jsonl").read_text().splitlines()]
    lines = [json.dumps(scene | {"captions": ["一只棕色的狗在草地上奔跑" * 9]}) for scene in scenes]
    (tmp_path / "scenes.jsonl").write_text("\n".join(lines))
    assert main(arguments(tmp_path, serve("--faults", "dear"), "detail=40", "--max-tokens", 30000)) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert 27000 < summary["prompt_tokens"] + summary["completion_tokens"] <= 30000
    assert main(arguments(tmp_path, serve("--faults", "dear"), "detail=40", "--max-cost", 0.1)) == 0
    assert 0.09 < json.loads((tmp_path / "out" / "summary.json").read_text())["cost"] <= 0.1


def test_dry_run_asks_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_scenes(tmp_path, 10)
    command = arguments(tmp_path, "http://127.0.0.1:9/v1", "conversation=10,detail=5", "--dry-run", "--json")
    assert main(command) == 0
    priced = json.loads(capfd.readouterr().out)
    assert priced["requests"] == 15
    assert priced["cost"] == pytest.approx((priced["prompt_tokens"] + 2 * priced["completion_tokens"]) / 1e6)
    assert 0 < priced["cost"] < priced["most"]
    assert not (tmp_path / "out").exists()


def test_a_second_run_asks_only_for_what_is_new(
    tmp_path: Path, serve: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    write_scenes(tmp_path, 30)
    url = serve()
    assert main(arguments(tmp_path, url, "detail=10")) == 0
    first = {entry["id"] for entry in json.loads((tmp_path / "out" / "data.json").read_text())}
    assert main(arguments(tmp_path, url, "detail=30,reasoning=5")) == 0
    assert first < {entry["id"] for entry in json.loads((tmp_path / "out" / "data.json").read_text())}
    assert answered(tmp_path).total() == 35 == len(answered(tmp_path))
    capfd.readouterr()
    assert main(arguments(tmp_path, url, "detail=30", "--model", "other")) == 2
    assert "holds a job with other settings (model): give another --out" in capfd.readouterr().err
    assert answered(tmp_path).total() == 35


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--count", "detail=99"], "only 5 images have captions for it: lower it"),
        (["--count", "poem=1"], "kind 'poem': expected one of conversation, detail, reasoning"),
        (["--count", "detail"], "expected KIND=NUMBER"),
        (["--count", "detail=1,detail=2"], "detail is given twice"),
        (["--kinds", "reasoning"], "--count gives no number of reasoning"),
        (["--max-cost", "1", "--model", "unheard-of"], "--max-cost needs the price of unheard-of"),
        (["--captions", "c.json"], "give either --captions"),
        (["--prompts", "/"], "expected one of conversation.yaml, detail.yaml, reasoning.yaml in it"),
    ],
)
def test_wrong_uses(tmp_path: Path, capfd: pytest.CaptureFixture[str], more: list[str], said: str) -> None:
    write_scenes(tmp_path, 5)
    assert main([*arguments(tmp_path, "http://127.0.0.1:9/v1", "detail=1"), *more]) in (1, 2)
    assert said in capfd.readouterr().err


def test_a_log_without_a_job(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log.jsonl").write_text("")
    assert main(["instruct", "replay", str(tmp_path / "log.jsonl"), "--out", str(tmp_path / "out")]) == 1
    assert "log.jsonl: holds no job; expected the raw log of a generation" in capfd.readouterr().err
    (tmp_path / "log.jsonl").write_text('{"key": "k", "attempt": 1}\n')
    assert main(["instruct", "replay", str(tmp_path / "log.jsonl"), "--out", str(tmp_path / "out")]) == 1
    assert "log.jsonl at byte 0: the raw log begins with no job" in capfd.readouterr().err


def test_a_key_is_asked_for_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_scenes(tmp_path, 2)
    monkeypatch.delenv("OPENAI_API_KEY")
    command = arguments(tmp_path, "", "detail=1")
    place = command.index("--base-url")
    assert main(command[:place] + command[place + 2 :]) == 2
    assert "set the environment variable OPENAI_API_KEY" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
