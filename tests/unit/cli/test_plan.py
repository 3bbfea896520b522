"""`anyres plan`: the report, the plan file and error messages."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import CLIPVisionConfig, LlamaConfig

from anyres_vlm.cli.main import main
from anyres_vlm.config import shipped_config


def anyres(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as stop:
        sys.exit(main([str(argument) for argument in arguments]))
    return int(stop.value.code or 0)


def write(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture
def index(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    tokens = rng.integers(100, 3000, 3000)
    return write(tmp_path / "index.parquet", tokens=tokens, tiles=rng.integers(0, 6, 3000).astype(np.int32))


def test_plan_file_agrees_with_the_report(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Efficiency and straggler factor recomputed from the file, by the definitions."""
    out = index.with_name("plan.parquet")
    options = ("--ranks", "4", "--capacity", "8192", "--json")
    assert anyres("plan", index, *options, "--out", out) == 0
    report = json.loads(capsys.readouterr().out)
    given, plan = pq.read_table(index).to_pydict(), pq.read_table(out)
    assert plan.column_names == ["sample", "pack", "step", "micro_step", "rank"]
    assert sorted(plan["sample"].to_pylist()) == list(range(3000))
    loads: dict[tuple[int, ...], int] = {}
    costs: dict[tuple[int, ...], float] = {}
    for sample, pack, *place in zip(*(plan[name].to_pylist() for name in plan.column_names), strict=True):
        size, tiles = given["tokens"][sample], given["tiles"][sample]
        loads[pack, *place] = loads.get((pack, *place), 0) + size
        costs[tuple(place)] = costs.get(tuple(place), 0) + size + 2e-5 * size**2 + 29 * tiles
    assert max(loads.values()) <= 8192
    assert len(loads) == len(costs) == report["packs"]
    assert report["efficiency"] == pytest.approx(sum(given["tokens"]) / (len(loads) * 8192))
    slowest: dict[tuple[int, ...], float] = {}
    for (*micro_step, _), cost in costs.items():
        slowest[tuple(micro_step)] = max(slowest.get(tuple(micro_step), 0), cost)
    assert report["straggler"] == pytest.approx(sum(slowest.values()) / (sum(costs.values()) / 4), rel=1e-5)


@pytest.mark.parametrize(("config", "tile"), [("llava_next_vicuna_7b", 29), ("tiny", None)])
def test_costs_of_a_shipped_configuration(
    index: Path, capsys: pytest.CaptureFixture[str], config: str, tile: float | None
) -> None:
    """Published base models need no files, embedded ones have them."""
    path = shipped_config(config)
    assert anyres("plan", index, "--model-config", path, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["cost_from"] == f"by FLOPs from {path}"
    assert tile is None or report["cost_tile"] == pytest.approx(tile, rel=0.05)


def test_same_arguments_same_bytes_and_ranks_keep_the_steps(index: Path) -> None:
    files = [index.with_name(f"{name}.parquet") for name in "abc"]
    for out, ranks in zip(files, ("8", "8", "2"), strict=True):
        assert anyres("plan", index, "--ranks", ranks, "--out", out) == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    eight, two = (pq.read_table(out).select(["sample", "pack", "step"]) for out in (files[0], files[2]))
    assert eight.equals(two)


def test_rows_with_another_status_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = ["ok", "no image", "ok", "ok"]
    path = write(
        tmp_path / "i.parquet", tokens=[5, 9999999, 7, 8], tiles=[1, 1, 1, 0], status=status, supervised=[1] * 4
    )
    assert anyres("plan", path, "--out", tmp_path / "p.parquet") == 0
    text = capsys.readouterr().out
    assert "3 samples, 20 tokens, 2 tiles (1 rows left out: status not ok), 3 supervised tokens" in text
    assert sorted(pq.read_table(tmp_path / "p.parquet")["sample"].to_pylist()) == [0, 2, 3]


def test_human_report(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert anyres("plan", index, "--packs-per-step", "6", "--ranks", "4") == 0
    text = capsys.readouterr().out
    assert "a 7B model with CLIP ViT-L/14-336; use --model-config" in text
    assert "6 packs per step do not divide evenly over 4 ranks: 2 of 8 places stay idle" in text


@pytest.mark.parametrize(
    ("columns", "options", "status", "message"),
    [
        (None, (), 2, "no such file; expected a Parquet file"),
        ({"tokens": [1]}, (), 1, "no column 'tiles' among tokens"),
        ({"tokens": [1.5], "tiles": [1]}, (), 1, "column 'tokens' is double"),
        ({"tokens": [1, None], "tiles": [1, 1]}, (), 1, "1 empty values; expected an integer in every row"),
        ({"tokens": [1, 0], "tiles": [1, 1]}, (), 1, "sample 1 has 0 tokens, expected at least 1"),
        ({"tokens": [1], "tiles": [-2]}, (), 1, "sample 0 has -2 tiles, expected at least 0"),
        (
            {"tokens": [1, 300], "tiles": [1, 1]},
            ("--capacity", "200"),
            2,
            "sample 1 has 300 tokens, more than --capacity",
        ),
        (
            {"tokens": [1], "tiles": [1], "status": ["bad"]},
            (),
            1,
            "no samples to plan: none of its 1 rows has status ok",
        ),
    ],
)
def test_mistakes(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    columns: dict[str, list[Any]] | None,
    options: tuple[str, ...],
    status: int,
    message: str,
) -> None:
    path = tmp_path / "index.parquet"
    if columns is not None:
        write(path, **columns)
    assert anyres("plan", path, *options) == status
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


VICUNA = LlamaConfig(hidden_size=4096, num_hidden_layers=32, vocab_size=32000)
LARGE = CLIPVisionConfig(
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    intermediate_size=4096,
    image_size=336,
    patch_size=14,
)


@pytest.mark.parametrize("local", [True, False], ids=["local folders", "hub ids, without a download"])
def test_costs_of_a_run(index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], local: bool) -> None:
    run = shipped_config("llava_next_vicuna_7b")
    if local:
        VICUNA.save_pretrained(tmp_path / "llm")
        LARGE.save_pretrained(tmp_path / "encoder")
        text = run.read_text().replace("lmsys/vicuna-7b-v1.5", str(tmp_path / "llm"))
        run = tmp_path / "run.yaml"
        run.write_text(text.replace("openai/clip-vit-large-patch14-336", str(tmp_path / "encoder")))
    assert anyres("plan", index, "--model-config", run, "--json") == 0
    assert json.loads(capsys.readouterr().out)["cost_tile"] == pytest.approx(29, rel=0.05)


def test_costs_of_embedded_models(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert anyres("plan", index, "--model-config", shipped_config("tiny"), "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["cost_from"] == f"by FLOPs from {shipped_config('tiny')}"
    assert 1 < report["cost_tile"] < 100


def test_costs_of_an_encoder_of_timm(index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    costs = []
    for name in ("vit_tiny_patch16_224", "vit_base_patch16_224"):
        run = tmp_path / f"{name}.yaml"
        text = shipped_config("tiny").read_text().replace("kind: clip", "kind: timm")
        run.write_text(text.replace("embedded:tiny-vit", name))
        assert anyres("plan", index, "--model-config", run, "--json") == 0
        costs.append(json.loads(capsys.readouterr().out)["cost_tile"])
    assert 10 < costs[1] / costs[0] < 16, "the base model has 4 x 4 times the weights of the tiny one in its blocks"


def test_a_file_that_is_not_parquet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "index.parquet").write_text("tokens,tiles\n1,2\n")
    assert anyres("plan", tmp_path / "index.parquet") == 1
    assert "cannot be read as Parquet" in capsys.readouterr().err
