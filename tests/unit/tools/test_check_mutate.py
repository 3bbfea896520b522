"""Faults are imported from memory: what tests see is killed, what hangs is ended, the file stays as it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mutate
import pytest

SOURCE = "def double(value: int) -> int:\n    return 2 * value\n"
RUN = """import os, pathlib, sys
import mutate
mutate.ROOT = pathlib.Path.cwd()
sys.path.insert(0, os.getcwd())
print(mutate.test("package/module.py", sys.argv[1], ["test_module.py"], float(sys.argv[2])))
"""


@pytest.mark.parametrize(
    ("old", "new", "outcome"),
    [
        ("2 * value", "3 * value", mutate.KILLED),
        ("2 * value", "2 * value ; 1 +", mutate.KILLED),
        ("2 * value", "value + value", mutate.SURVIVED),
        ("return", "while value: pass\n    return", mutate.TIMED_OUT),
    ],
)
def test_a_fault_is_judged_by_the_tests(tmp_path: Path, old: str, new: str, outcome: str) -> None:
    module = tmp_path / "package" / "module.py"
    module.parent.mkdir()
    module.write_text(SOURCE)
    checks = "from package.module import double\n\n\ndef test_double():\n    assert double(4) == 8\n"
    (tmp_path / "test_module.py").write_text(checks)
    limit_s = "3" if outcome == mutate.TIMED_OUT else "60"
    command = [sys.executable, "-c", RUN, SOURCE.replace(old, new), limit_s]
    environment = {"PYTHONPATH": str(Path(mutate.__file__).parent), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[-2] == outcome
    assert module.read_text() == SOURCE


def test_faults_are_found_but_not_in_annotations() -> None:
    pytest.importorskip("cosmic_ray", reason="extra mutation")
    found = list(
        mutate.mutants("def over(value: int | None, least: int = 3) -> bool | int:\n    return value > least\n")
    )
    assert len(found) == len(set(found))
    assert any("value >= least" in source for source in found)
    assert any("least: int = 4" in source.replace("  ", " ") for source in found)
    assert all("int | None" in source and "bool | int" in source for source in found)


def test_every_target_exists() -> None:
    for modules, tests in mutate.TARGETS.values():
        assert all((mutate.ROOT / path).is_file() for path in (*modules, *tests))
