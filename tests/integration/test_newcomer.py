"""All commands of README.md and the guides, in a fresh clone and its own environment."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_every_command_of_the_documentation_runs(tmp_path: Path) -> None:
    done = subprocess.run([ROOT / "tools" / "newcomer", tmp_path], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout.decode()[-3000:]
