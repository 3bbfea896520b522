"""Predicted memory is that of really running steps: every byte that torch's allocator gave out, on CPU over gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOOL = Path(__file__).parents[3] / "tools" / "check" / "memory.py"
TOLERANCE = 0.10


def check(*options: str) -> list[dict[str, Any]]:
    """In a process of its own, which forks its ranks before torch has made threads."""
    done = subprocess.run(
        [sys.executable, str(TOOL), "--json", *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows: list[dict[str, Any]] = json.loads(done.stdout[done.stdout.index("[\n") :])
    return rows


def assert_near(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        for part, (predicted, measured) in row["bytes"].items():
            assert measured > 0
            assert predicted == pytest.approx(measured, rel=TOLERANCE), f"{part} of {row}"


@pytest.mark.slow
def test_memory_of_a_model_split_over_two_ranks() -> None:
    rows = check("--quick")
    assert [(row["preset"], row["ranks"]) for row in rows] == [("zero3", 2)]
    assert_near(rows)


@pytest.mark.slow
def test_memory_of_every_size_preset_and_precision() -> None:
    rows = check()
    assert len(rows) == 54
    assert_near(rows)
