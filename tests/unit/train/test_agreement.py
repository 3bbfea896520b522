"""Ranks that see other files than rank 0 end the run, on every rank, with the two views in one line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from anyres_vlm.errors import UsageError
from anyres_vlm.train import agreement
from anyres_vlm.train.agreement import agree, describe_stages
from anyres_vlm.train.checkpoint import Finished, write_finished


def ranks(*others: str) -> Any:
    """An engine whose ranks 1, 2, ... have these views, in the folder /b on node2."""
    return SimpleNamespace(gather=lambda own: [own, *((view, "/b on node2") for view in others)], world_size=3)


def test_other_views_are_named(tmp_path: Path) -> None:
    agree(ranks("step 4", "step 4"), tmp_path, "step 4")
    expected = rf"^--output: rank 0 sees step 4 in {tmp_path} on .*, rank 2 sees step 2 in /b on node2: choose .*$"
    with pytest.raises(UsageError, match=expected):
        agree(ranks("step 4", "step 2"), tmp_path, "step 4")


def test_a_stale_view_is_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(agreement.time, "sleep", waits.append)
    agree(ranks("new"), tmp_path, lambda: "new" if 20.0 in waits else "old", agreement.STALE_S)
    assert waits == [0.0, 5.0, 10.0, 20.0]
    with pytest.raises(UsageError, match="rank 0 sees old"):
        agree(ranks("new"), tmp_path, lambda: "old", agreement.STALE_S)
    assert sum(waits) > 60 + 20  # NFS clients keep what they know for a minute


def test_every_file_that_decides_where_a_run_resumes_is_in_the_view(tmp_path: Path) -> None:
    seen = [describe_stages(tmp_path)]
    assert seen[0].startswith(
        "stage1 with no configuration, no checkpoint, no model, no record of its end; stage2 with"
    )
    for name in ("stage1/checkpoints/step-0000002", "stage1/checkpoints/step-0000010", "stage1/model", "stage2/model"):
        (tmp_path / name).mkdir(parents=True)
        seen.append(describe_stages(tmp_path))
    (tmp_path / "stage2" / "config.yaml").touch()
    seen.append(describe_stages(tmp_path))
    for steps in (4, 5):
        write_finished(tmp_path / "stage1", Finished(steps, 9, 1))
        seen.append(describe_stages(tmp_path))
    (tmp_path / "stage1" / "finished.json").write_text("{")
    seen.append(describe_stages(tmp_path))
    assert len(set(seen)) == len(seen)
    assert "a checkpoint of step 10, a model, its end after 5 steps" in seen[-2]
