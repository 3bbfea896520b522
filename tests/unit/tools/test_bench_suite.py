"""The suite on benchmarks that say what they are told: what fell, failed or is missing is named, what rose is not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[3] / "tools"
README = "# Tools\n\n```sh\ntools/bench/a.py one      # a comment\ntools/bench/b.py --size 2\n```\n\n```sh\nno\n```\n"
FAKE = """import json, pathlib, sys
assert "--json" in sys.argv
said = json.loads(pathlib.Path("said.json").read_text())[pathlib.Path(sys.argv[0]).stem]
sys.exit(said) if isinstance(said, int) else print(json.dumps({"ratios": said}))
"""
FIRST = {"a": {"speed": [2.0, 1.9, 2.5]}, "b": {"memory": [10.0], "speed": [1.0]}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the suite beside two benchmarks, whose first ratios are committed."""
    (tmp_path / "tools" / "bench").mkdir(parents=True)
    shutil.copy(TOOLS / "bench" / "suite", tmp_path / "tools" / "bench")
    (tmp_path / "tools" / "README.md").write_text(README)
    for name in FIRST:
        (tmp_path / "tools" / "bench" / f"{name}.py").write_text(FAKE)
    assert run(tmp_path, FIRST, "--commit").returncode == 0
    return tmp_path


def run(folder: Path, said: dict[str, object], *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "said.json").write_text(json.dumps(said))
    command = [sys.executable, str(folder / "tools" / "bench" / "suite"), *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


def faults(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What is said behind the commands' times."""
    assert done.returncode == (1 if len(done.stderr.splitlines()) > 2 else 0)
    return done.stderr.splitlines()[2:]


def test_a_regression_is_named(folder: Path) -> None:
    done = run(folder, {"a": {"speed": [3.0, 1.6, 0.1]}, "b": {"memory": [8.6], "speed": [0.84]}})
    assert faults(done) == [
        "a.py one: speed was 2 and is 1.6, 20% less",
        "b.py --size 2: speed was 1 and is 0.84, 16% less",
    ]


def test_an_improvement_and_a_new_ratio_pass(folder: Path) -> None:
    done = run(folder, {"a": {"speed": [9.0], "new": [0.1]}, "b": FIRST["b"]}, "--repeat", "2")
    assert faults(done) == []
    row = next(line for line in done.stdout.splitlines() if line.startswith("a.py one: new"))
    assert row.split()[-5:] == ["0.1", "0.1", "0.1", "2", "new"]


def test_what_is_missing_or_fails_is_named_and_the_rest_is_measured(folder: Path) -> None:
    done = run(folder, {"a": 3, "b": {"speed": [1.0]}}, "--out", "bench.json")
    assert faults(done) == [
        "tools/bench/a.py one failed with exit status 3",
        "a.py one: speed was 2 and was not measured",
        "b.py --size 2: memory was 10 and was not measured",
    ]
    written = json.loads((folder / "bench.json").read_text())
    assert written == {"mode": "full", "ratios": {"b.py --size 2: speed": [1.0]}}


def test_only_what_is_asked_for_is_run_and_compared(folder: Path) -> None:
    done = run(folder, {"a": {"speed": [2.0]}, "b": 1}, "--only", "a.py")
    assert done.returncode == 0
    assert "b.py" not in done.stdout + done.stderr
    assert run(folder, FIRST, "--only", "c.py").returncode == 2
