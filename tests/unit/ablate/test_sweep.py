"""A sweep's file becomes runs: which combinations there are, what they share, and what is wrong with a file."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from anyres_vlm.ablate.sweep import Cell, expand, read_sweep
from anyres_vlm.cli.main import main
from anyres_vlm.config import load_config, shipped_config
from anyres_vlm.errors import UsageError

AXES: dict[str, Any] = {
    "stage 1": {"trained": {}, "skipped": {"skip_stage1": True}},
    "projector": {"mlp": {}, "linear": {"set": {"model.projector": "linear"}}},
    "volume": {
        "all": {},
        "half": {"set": {"stage2.data.samples": 50}},
        "tenth": {"set": {"stage2.data.samples": 10}, "seeds": [1]},
    },
    "grid": {"2x2": {}, "1x1": {"set": {"model.grid": "1x1"}}},
}
MEASURE = {"run": "probe reading", "numbers": {"read": "reading.height.8.words"}}


def write(folder: Path, **changes: Any) -> Path:
    content = {"base": str(shipped_config("tiny")), "seeds": [0, 1], "axes": AXES, "measure": [MEASURE], **changes}
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def cells(folder: Path, **changes: Any) -> list[Cell]:
    return expand(read_sweep(write(folder, **changes)))


def changed(cell: Cell) -> tuple[str, ...]:
    return tuple(cell.changed.values())


def test_one_choice_at_a_time_against_the_baseline(tmp_path: Path) -> None:
    found = [(cell.seed, changed(cell)) for cell in cells(tmp_path)]
    variants = [(), ("skipped",), ("linear",), ("half",), ("tenth",), ("1x1",)]
    assert found == [(seed, names) for seed in (0, 1) for names in variants if (seed, names) != (0, ("tenth",))]


def test_a_grid_has_every_combination_that_its_seeds_allow(tmp_path: Path) -> None:
    found = {(cell.seed, tuple(cell.choices.values())) for cell in cells(tmp_path, combine="grid")}
    every = itertools.product((0, 1), itertools.product(*AXES.values()))
    assert found == {(seed, names) for seed, names in every if seed == 1 or "tenth" not in names}
    assert len(found) == 16 + 24


def test_a_cell_is_the_base_with_its_settings_and_seed(tmp_path: Path) -> None:
    found = {(cell.seed, changed(cell)): cell for cell in cells(tmp_path, set={"stage1.learning_rate": 0.5})}
    cell = found[1, ("half",)]
    sets = ["stage1.learning_rate=0.5", "stage2.data.samples=50", "seed=1"]
    assert cell.config == load_config(shipped_config("tiny"), sets)
    assert not cell.skip_stage1
    assert found[0, ("skipped",)].skip_stage1


def test_stage_1_is_shared_where_it_is_the_same(tmp_path: Path) -> None:
    found = {(cell.seed, changed(cell)): cell for cell in cells(tmp_path)}
    for seed in (0, 1):
        baseline = found[seed, ()]
        assert found[seed, ("half",)].stage1_key == baseline.stage1_key is not None
        assert found[seed, ("skipped",)].stage1_key is None
    assert found[1, ("tenth",)].stage1_key == found[1, ()].stage1_key
    keys = {found[seed, names].stage1_key for seed in (0, 1) for names in ((), ("linear",), ("1x1",))}
    assert len(keys) == 6, "projector, grid and seed decide stage 1"
    assert len({cell.key for cell in found.values()}) == len({cell.name for cell in found.values()}) == 11


def test_keys_are_of_what_decides_and_not_of_names(tmp_path: Path) -> None:
    before = [cell.key for cell in cells(tmp_path)]
    renamed = {f"my {axis}": {f"{name}!": v for name, v in variants.items()} for axis, variants in AXES.items()}
    assert [cell.key for cell in cells(tmp_path, axes=renamed)] == before
    assert [cell.key for cell in cells(tmp_path, set={"save_every": 7, "workers": 0})] == before
    assert not set(before) & {cell.key for cell in cells(tmp_path, set={"stage2.learning_rate": 0.5})}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axis": {}}, r"unknown key axis; did you mean axes\?"),
        (
            {"axes": {"a": {"x": {}, "y": {"skip_stage": True}}}},
            r"unknown key axes\.a\.y\.skip_stage; did you mean skip_stage1\?",
        ),
        (
            {"axes": {"a": {"x": {}, "set": {"published": [{"benchmrk": "GQA"}]}}}},
            r"unknown key axes\.a\.set\.published\.0\.benchmrk; did you mean benchmark\?",
        ),
        ({"axes": {"a": {"x": {}}}}, r"axes\.a: .* at least 2"),
        (
            {"axes": {"a": {"x": {}, "y": {"set": {"stage2.learning_rat": 1}}}}},
            r"a=y: .* unknown key stage2\.learning_rat; did you mean learning_rate\?",
        ),
        ({"axes": {"a": {"x": {}, "y": {"set": {"model.grid": "2x2"}}}}}, "a=x and a=y are the same run"),
        ({"axes": {"a": {"x": {}, "y": {"seeds": [5]}}}}, r"axes\.a\.y\.seeds has 5.*\[0, 1\]"),
        ({"measure": [{**MEASURE, "rendred": 3}]}, r"unknown key measure\.0\.rendred; did you mean rendered\?"),
        ({"measure": [MEASURE, MEASURE]}, "numbers: 'read' occurs twice"),
        ({"base": "no.yaml"}, r"base no\.yaml: no such file in its folder"),
        ({"seeds": []}, "seeds: .* at least 1"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        cells(tmp_path, **changes)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("probe reading --cout 3", "No such option: --cout"),
        ("probe readin", "'readin'"),
        ("evaluate heldout", "No such command 'evaluate'"),
        ("eval heldout", "Missing option '--data'"),
    ],
)
def test_a_measure_is_checked_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, message: str
) -> None:
    path = write(tmp_path, measure=[{**MEASURE, "run": command}])
    assert main(["ablate", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert f"error: measure '{command}' is not a command" in error
    assert not (tmp_path / "out").exists()


def test_the_shipped_example_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    path = shipped_config("ablation_tiny")
    sweep = read_sweep(path)
    assert main(["ablate", str(path), "--dry-run", "--out", "nowhere"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > len(expand(sweep)) >= 3 * 6
    (effect,) = sweep.axes["stage 1"]["skipped"].published
    assert effect.delta == pytest.approx(-5.11), "as LLaVA's text has it"
