"""`anyres estimate`: its figures against each other and against the planner's, and its mistakes in a line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from anyres_vlm.cli.main import main
from anyres_vlm.data.index.table import read_index
from anyres_vlm.preflight.estimate.workload import Work, find_device


def anyres(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty rendered samples, counted."""
    folder = tmp_path_factory.mktemp("data")
    assert anyres("render", folder / "data", "--purpose", "heldout", "--count", 40) == 0
    out = folder / "index.parquet"
    assert anyres("index", folder / "data" / "data.json", "--out", out, "--workers", 1) == 0
    return out


def estimate(capsys: pytest.CaptureFixture[str], *options: object) -> dict[str, Any]:
    capsys.readouterr()
    assert anyres("estimate", "--json", *options) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_stage_2_is_what_the_index_says(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--index", index, "--index", f"stage1={index}", "--gpus", 2, "--device", "l40s-48gb", "--price", 3)
    found = estimate(capsys, *options)
    stage = found["stages"][1]
    counted = read_index(index)
    assert (stage["samples"], stage["tokens"]) == (len(counted), int(counted.tokens.sum()))
    capacity = stage["capacity"]
    capsys.readouterr()
    assert anyres("plan", index, "--capacity", capacity, "--batch-size", 16, "--ranks", 2, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert (stage["plan"]["packs"], stage["plan"]["steps"]) == (plan["packs"], plan["steps"])
    assert stage["chosen"] == "none"
    assert stage["cost"] == pytest.approx(3 * 2 * stage["hours"])
    peak, flops = 362e12, stage["flops"]["useful"]
    assert stage["hours"] == pytest.approx(flops * stage["plan"]["straggler"] / (2 * peak * 0.4) / 3600)


def test_without_an_index_the_recipe_s_data_is_assumed_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert anyres("estimate", "--gpus", 1) == 0
    text = capsys.readouterr().out
    assert "assumed: 558,128 samples" in text
    assert "assumed: 665,298 samples, 624,610 of them with an image" in text
    assert "cheapest that fits: none" in text
    assert "both stages:" in text


def test_time_follows_from_mfu_stragglers_and_recomputation() -> None:
    device, work = find_device("a100-80gb"), Work(useful=3e18, recomputed=1e18)
    hours = work.hours(device, gpus=4, mfu=0.5)
    assert hours == pytest.approx(4e18 / (4 * 312e12 * 0.5) / 3600)
    assert work.hours(device, gpus=4, mfu=0.25, straggler=1.5) == pytest.approx(3 * hours)
    assert work.implied_mfu(device, 4, hours) == pytest.approx(0.5 * 3 / 4)


def test_nothing_fits_and_the_reason_is_said(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = estimate(
        capsys, "--index", index, "--index", f"stage1={index}", "--device", "l4-24gb", "--headroom", 0.9,
        "--set", "model.llm=lmsys/vicuna-7b-v1.5", "--set", "model.encoder.name=openai/clip-vit-large-patch14-336",
    )  # fmt: skip
    for stage in found["stages"]:
        assert (stage["chosen"], stage["hours"]) == (None, None)
        assert "nothing fits" in stage["reason"]
        assert re.search(r"zero3_offload.*: weights, gradients and optimizer alone take \d", stage["reason"])


def test_published_runs_imply_a_possible_mfu(capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads((anyres("estimate", "--published", "--json"), capsys.readouterr().out)[1])
    assert [(row["run"], row["published_hours"]) for row in rows][:4] == [
        ("LLaVA-1.5-7B", 3.5),
        ("LLaVA-1.5-7B", 10),
        ("LLaVA-1.5-13B", 5.5),
        ("LLaVA-1.5-13B", 20),
    ]
    for row in rows:
        assert 0.15 < row["implied_mfu"] < 0.75
        # MFU counts nothing twice, and what is computed again costs a third more at the most
        assert 1 < row["predicted_hours"] * 0.4 / (row["implied_mfu"] * row["published_hours"]) < 1.51


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (("--device", "h100"), 2, "did you mean h"),
        (("--index", "a", "--index", "b"), 2, "stage2 already has a"),
        (("--index", "nowhere.parquet"), 1, "no such index; build it with anyres index"),
        (("--config", "nowhere.yaml"), 2, "no such file"),
        (("--set", "model.llm=./nowhere"), 1, "no configuration of './nowhere' is available"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], options: tuple[str, ...], status: int, message: str) -> None:
    assert anyres("estimate", *options) == status
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
