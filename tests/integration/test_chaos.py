"""The chaos tool in small: two kills, one of them during a save, on one rank and on two."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "check" / "chaos.py"


@pytest.mark.slow
def test_two_kills_leave_no_trace() -> None:
    done = subprocess.run(
        [sys.executable, str(TOOL), "--kills", "2"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("beside an undisturbed run: equal to the bit") == 2
    assert done.stdout.count("| 2 | ") == 2
