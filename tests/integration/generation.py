"""What tests of `anyres instruct generate` share: its server, its command, and what must be true when it has ended."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from anyres_vlm.cli.main import main

SERVER = Path(__file__).parent / "openai_server.py"
CONCURRENCY = 16


def start_server(folder: Path, *arguments: object) -> tuple[subprocess.Popen[str], str]:
    """A server with the given arguments, and its base URL. Its state is in folder/state."""
    (folder / "state").mkdir(exist_ok=True)
    command = [sys.executable, str(SERVER), str(folder / "state"), *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, f"http://127.0.0.1:{process.stdout.readline().strip()}/v1"


def write_scenes(folder: Path, count: int) -> Path:
    with (folder / "scenes.jsonl").open("w") as stream:
        for number in range(count):
            scene = {"id": number, "image": f"{number}.png", "width": 60, "height": 40, "captions": [f"Dog {number}."]}
            stream.write(json.dumps({**scene, "boxes": [{"category": "dog", "box": [5, 5, 20, 20]}]}) + "\n")
    return folder / "scenes.jsonl"


def arguments(folder: Path, url: str, count: str, *more: object, retries: int = 12) -> list[str]:
    config = folder / "settings.yaml"
    limits = f"limits: {{timeout_s: 2, retries: {retries}, poll_s: 0.05, concurrency: {CONCURRENCY}}}"
    config.write_text(f"model: m\n{limits}\nchecks: {{attempts: 6}}\nprices: {{m: {{input: 1, output: 2}}}}\n")
    given = ["instruct", "generate", "--descriptions", folder / "scenes.jsonl", "--config", config, "--count", count]
    return [str(word) for word in [*given, "--base-url", url, "--out", folder / "out", *more]]


def answered(folder: Path) -> Counter[str]:
    """How often each attempt was answered, and so paid for."""
    lines = (folder / "state" / "answered.jsonl").read_text().splitlines()
    return Counter(json.loads(line)["name"] for line in lines)


def logged(folder: Path) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (folder / "out" / "responses.jsonl").read_text().splitlines()]
    return [entry for entry in entries if "key" in entry]


def require_whole(folder: Path, items: int, resent: int = 0) -> dict[str, Any]:
    """Every item is accepted or rejected, once; every answer is logged, once; the log rebuilds the data."""
    summary: dict[str, Any] = json.loads((folder / "out" / "summary.json").read_text())
    assert summary["items"] == items == summary["accepted"] + summary["rejected"]
    assert summary["unfinished"] == 0
    accepted = [entry["id"] for entry in json.loads((folder / "out" / "data.json").read_text())]
    rejected = [json.loads(line)["id"] for line in (folder / "out" / "rejects.jsonl").read_text().splitlines()]
    assert len({*accepted, *rejected}) == len(accepted) + len(rejected) == items
    log = [f"{entry['key']}-{entry['attempt']}" for entry in logged(folder)]
    assert len(set(log)) == len(log) == summary["responses"]
    paid = answered(folder)
    assert set(log) <= set(paid)
    assert paid.total() - len(log) <= resent  # what was under way when the client was killed
    before = {name: (folder / "out" / name).read_bytes() for name in ("data.json", "rejects.jsonl", "summary.json")}
    (folder / "out" / "responses.jsonl").rename(folder / "alone.jsonl")
    assert main(["instruct", "replay", str(folder / "alone.jsonl"), "--out", str(folder / "replayed")]) == 0
    assert {name: (folder / "replayed" / name).read_bytes() for name in before} == before
    return summary


def run_killed(command: list[str], log: Path, kills: int, every: int) -> None:
    """Run the command; SIGKILL it each time the log has grown by so many lines, then let it end."""
    for kill in range(kills + 1):
        process = subprocess.Popen([sys.executable, "-m", "anyres_vlm", *command], stdout=subprocess.DEVNULL)
        if kill == kills:
            assert process.wait(timeout=300) == 0
            return
        while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < (kill + 1) * every):
            time.sleep(0.01)
        assert process.poll() is None, "ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        with log.open("ab") as stream:
            stream.write(b'{"key": "torn by the ki')


def run_killed_at_random(folder: Path, command: list[str], kills: int, longest_s: float) -> int:
    """Run the command; SIGKILL it at a random moment after its first request, then let it end. Returns the kills."""
    chance, killed, heard = random.Random(7), 0, folder / "state" / "headers.txt"
    for _ in range(kills):
        heard.unlink(missing_ok=True)
        process = subprocess.Popen([sys.executable, "-m", "anyres_vlm", *command], stdout=subprocess.DEVNULL)
        while process.poll() is None and not heard.exists():
            time.sleep(0.01)
        time.sleep(chance.uniform(0, longest_s))
        killed += process.poll() is None
        process.kill()
        process.wait()
    assert main(command) == 0
    return killed
