"""What train/engine/zero.py uses of DeepSpeed's internals is listed in one place, and is there."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from packaging.requirements import Requirement

from anyres_vlm.errors import UsageError
from anyres_vlm.train.engine import zero

ROOT = Path(__file__).parents[3]


SMALL_STEPS = """
from anyres_vlm.config import load_config, shipped_config
from anyres_vlm.train.engine.deepspeed_settings import find_preset, resolve_deepspeed
from anyres_vlm.train.engine.ranks import try_presets

config = load_config(shipped_config("tiny"))
presets = (find_preset(name) for name in ("zero1", "zero2", "zero3"))
settings = [resolve_deepspeed(path, config, "stage2", has_cuda=False) for path in presets]
try_presets(settings, bf16=config.precision == "bf16")
"""


def test_the_installed_deepspeed_is_of_the_pinned_minor_version() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pins = [
        Requirement(line).specifier for name in ("deepspeed", "test") for line in extras[name] if "deepspeed" in line
    ]
    assert len(pins) == 2
    for pin in pins:
        assert pin.contains(version("deepspeed"))
        assert pin.contains("0.19.99")
        assert not pin.contains("0.18.9")
        assert not pin.contains("0.20.0")


def test_every_attribute_that_is_used_is_listed() -> None:
    tree = ast.parse(Path(cast(str, zero.__file__)).read_text(encoding="utf-8"))
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self._engine", "self._zero")
    }
    used |= {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr.startswith(("ds_", "__comp", "set_full_", "set_local_"))
    }
    listed = {name for names in zero.INTERNALS.values() for name in names}
    assert used == listed, used ^ listed


def test_the_internals_are_there() -> None:
    """Fails when they move, before any run does: one small step under each ZeRO stage.

    In a process of its own, because DeepSpeed keeps the first process group for good.
    """
    done = subprocess.run([sys.executable, "-c", SMALL_STEPS], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("missing", [name for names in zero.INTERNALS.values() for name in names])
def test_a_moved_attribute_is_named(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    every = {name: lambda: None for names in zero.INTERNALS.values() for name in names if name != missing}
    for stage in (2, 3):
        engine = SimpleNamespace(**every)
        if missing != "zero_optimization_stage":
            engine.zero_optimization_stage = lambda stage=stage: stage
        subject = SimpleNamespace(**every)
        if missing != "ds_tensor":
            subject.ds_tensor = subject
        monkeypatch.setattr(zero.deepspeed, "ops", subject)
        only = {name: at for at, names in ((2, "1 and ZeRO-2"), (3, "3")) for name in listed(names)}
        if only.get(missing, stage) != stage:
            zero.require_internals(engine, subject, subject)
            continue
        words = rf"DeepSpeed {version('deepspeed')} has no {missing} in the .*: pip install 'anyres-vlm\[deepspeed\]'$"
        with pytest.raises(UsageError, match=words):
            zero.require_internals(engine, subject, subject)


def listed(stages: str) -> list[str]:
    """What only these ZeRO stages have."""
    return [name for what, names in zero.INTERNALS.items() if what.endswith(f"ZeRO-{stages}") for name in names]
