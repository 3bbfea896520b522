"""`anyres score` on contents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from anyres_vlm.cli.main import main


def scored(folder: Path, capsys: pytest.CaptureFixture, name: str, answers: Any, annotations: Any) -> dict[str, Any]:
    """What `anyres score` prints for these contents."""
    status, out, err = run_score(folder, capsys, name, answers, annotations)
    assert status == 0, err
    return json.loads(out)["scores"]


def run_score(
    folder: Path, capsys: pytest.CaptureFixture, name: str, answers: Any, annotations: Any
) -> tuple[int, str, str]:
    given = folder / "answers.json"
    given.write_text(json.dumps(answers))
    files = annotations if isinstance(annotations, dict) and name == "pope" else {"official.json": annotations}
    for file, content in files.items():
        (folder / file).write_text(content if isinstance(content, str) else json.dumps(content))
    flags = [word for file in files for word in ("--annotations", str(folder / file))]
    capsys.readouterr()
    status = main(["score", name, "--answers", str(given), *flags, "--json"])
    return status, *capsys.readouterr()
