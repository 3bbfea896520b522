"""The watch itself sees what it is there for."""

from __future__ import annotations

import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import watch
from watch import watched


@pytest.mark.parametrize(
    ("forbidden", "said"),
    [
        (lambda folder: (folder / "file").write_text("x"), "wrote .*file"),
        (lambda folder: (folder / "new").mkdir(), "wrote .*new"),
        (lambda folder: subprocess.run(["true"]), "subprocess.Popen"),
        (lambda folder: pickle.loads(pickle.dumps(Path("/"))), "pickle.find_class"),
        (lambda folder: np.ones(1_200_000_000, np.uint8), "further memory"),
    ],
)
def test_each_offence_is_seen(tmp_path: Path, forbidden: Callable[[Path], Any], said: str) -> None:
    with pytest.raises(AssertionError, match=said), watched(tmp_path / "out"):
        forbidden(tmp_path)


def test_slowness_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SLOW_S", -1.0)
    with pytest.raises(AssertionError, match="at most -1"), watched(tmp_path):
        pass


def test_what_is_allowed_passes_and_errors_do_too(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("x")
    with watched(tmp_path / "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "file").write_text((tmp_path / "in").read_text())
        np.ones(1 << 20)
    with pytest.raises(KeyError), watched(tmp_path / "out"):
        raise KeyError("own")


def test_an_offence_before_an_error_is_seen(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="wrote"), watched(tmp_path / "out"):
        raise KeyError((tmp_path / "file").touch())
