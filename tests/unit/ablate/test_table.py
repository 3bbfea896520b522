"""The table's figures against NumPy and plain definitions, and its verdict on effects within the seeds' spread."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from anyres_vlm.ablate.jobs import RESULT_FILE, SweepRun, measure_key, numbers
from anyres_vlm.ablate.sweep import Measure, expand, read_sweep
from anyres_vlm.ablate.table import Number, Table, compare, make_table, markdown
from anyres_vlm.cli.main import main
from anyres_vlm.config import shipped_config
from anyres_vlm.errors import UsageError

SWEEP: dict[str, Any] = {
    "base": str(shipped_config("tiny")),
    "seeds": [0, 1, 2],
    "axes": {
        "projector": {
            "mlp": {},
            "linear": {
                "set": {"model.projector": "linear"},
                "published": [{"benchmark": "GQA", "baseline": 47.3, "variant": 46.8, "source": "a paper"}],
                "note": "as LLaVA had it",
            },
        },
        "rate": {"usual": {}, "high": {"set": {"stage2.learning_rate": 0.5}, "seeds": [0, 2]}},
    },
    "measure": [
        {
            "run": "probe reading",
            "numbers": {"small": ["reading.5", "reading.6"], "turned": "reading.90"},
        },
        {"run": "probe counting", "numbers": {"error": "counting.all.error"}, "scale": 1},
    ],
}


def finish(folder: Path, combine: str = "one_at_a_time") -> tuple[SweepRun, dict[tuple[str, ...], np.ndarray]]:
    """A sweep with invented results, and small, turned and error by row and seed."""
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({**SWEEP, "combine": combine}, sort_keys=False))
    run = SweepRun(read_sweep(path), folder / "out")
    rng = np.random.default_rng(5)
    raw: dict[tuple[str, ...], list[list[float]]] = {}
    for cell in expand(run.sweep):
        five, six, turned, error = rng.random(4)
        raw.setdefault(tuple(cell.choices.values()), []).append([50 * (five + six), 100 * turned, error])
        scores = {
            measure_key(run.sweep.measure[0]): {"reading": {"5": five, "6": six, "90": turned}},
            measure_key(run.sweep.measure[1]): {"counting": {"all": {"error": error}}},
        }
        run.folder(cell).mkdir(parents=True)
        (run.folder(cell) / RESULT_FILE).write_text(json.dumps({"scores": scores}))
    return run, {choices: np.array(values) for choices, values in raw.items()}


@pytest.mark.parametrize("combine", ["one_at_a_time", "grid"])
def test_means_spreads_and_differences(tmp_path: Path, combine: str) -> None:
    run, raw = finish(tmp_path, combine)
    table = make_table(run)
    assert table.titles == ["small", "turned", "error"]
    assert [tuple(row.choices.values()) for row in table.rows] == list(raw)
    base = raw["mlp", "usual"]
    for row in table.rows:
        values = raw[tuple(row.choices.values())]
        same_seeds = base[[0, 2]] if len(values) == 2 else base
        for place, title in enumerate(table.titles):
            number = row.numbers[title]
            assert number.mean == pytest.approx(np.mean(values, 0)[place])
            assert number.spread == pytest.approx(np.std(values, 0, ddof=1)[place])
            if not row.changed:
                assert number.delta is number.verdict is None
                continue
            assert number.delta == pytest.approx((values - same_seeds).mean(0)[place])
            if len(values) == 2:
                assert number.verdict == "too few seeds"
    assert table.missing == 0
    both = [row for row in table.rows if len(row.changed) == 2]
    assert all(not row.published and not row.notes for row in both)
    assert len(both) == (combine == "grid")


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        ([5.0, 6.0, 7.0], [2.0, 3.0, 4.9], "shown"),
        ([2.0, 3.0, 4.9], [5.0, 6.0, 7.0], "shown"),
        ([5.0, 6.0, 7.0], [2.0, 3.0, 5.1], "not shown"),
        ([5.0, 6.0, 7.0], [5.0, 5.0, 5.0], "not shown"),
        ([5.0, 6.0], [1.0, 1.0], "too few seeds"),
    ],
)
def test_an_effect_is_shown_where_the_seeds_do_not_overlap(ours: Any, theirs: Any, verdict: str) -> None:
    assert compare(dict(enumerate(ours)), dict(enumerate(theirs))).verdict == verdict


def test_seeds_that_only_one_row_has_are_no_difference() -> None:
    number = compare({0: 1.0, 2: 3.0, 3: 90.0}, {0: 2.0, 1: 50.0, 2: 5.0})
    assert number == Number({0: 1.0, 2: 3.0, 3: 90.0}, 94 / 3, pytest.approx(50.82, abs=0.01), -1.5, "too few seeds")
    assert compare({}, {0: 1.0}) == Number({}, None, None, None, None)


def test_the_page_says_what_is_shown_what_is_missing_and_what_was_published(tmp_path: Path) -> None:
    run, _ = finish(tmp_path)
    high, linear = {0: 10.0, 1: 11.0, 2: 12.0}, {0: 1.0, 1: 12.5, 2: 3.0}
    table = make_table(run)
    numbers = dict.fromkeys(table.titles, compare(high, None))
    rows = [table.rows[0].__class__(**{**vars(table.rows[0]), "numbers": numbers})]
    for row, values in zip(table.rows[1:], (linear, {0: 1.0, 2: 3.0}), strict=True):
        rows.append(row.__class__(**{**vars(row), "numbers": dict.fromkeys(table.titles, compare(values, high))}))
    text = markdown(Table(table.titles, table.seeds, rows))
    assert "| baseline (projector: mlp; rate: usual) | 11.0 ± 1.0 |" in text
    assert "| projector: linear | 5.5 ± 6.1 (-5.5, *not shown*) |" in text
    assert "| GQA -0.5 [1] |" in text
    assert "- [1] a paper" in text
    assert "- projector: linear: as LLaVA had it" in text
    assert "| rate: high | 2.0 ± 1.4 (-9.0, 2 of 3 seeds) |" in text
    assert "seeds 0, 1, 2" in text
    orders = list(itertools.permutations([0, 0, 0, 1, 1, 1]))
    apart = [order[:3] in ((0, 0, 0), (1, 1, 1)) for order in orders]
    assert f"the seeds would be apart in {sum(apart) / len(orders):.0%}" in text
    assert "Not finished" not in text


def test_the_command_draws_what_is_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = finish(tmp_path)
    cells = expand(run.sweep)
    (run.folder(cells[1]) / RESULT_FILE).unlink()
    assert main(["ablate", str(tmp_path / "sweep.yaml"), "--out", str(run.out), "--table"]) == 0
    assert "Not finished: 1 of 8 runs are missing." in capsys.readouterr().out
    table = json.loads((run.out / "table.json").read_text())
    assert [sorted(row["numbers"]["small"]["by_seed"]) for row in table["rows"]] == [
        ["0", "1", "2"],
        ["1", "2"],
        ["0", "2"],
    ]
    assert (run.out / "table.png").stat().st_size > 5000
    assert (run.out / "table.md").read_text() == markdown(make_table(run))


def test_results_are_found_again_under_other_names(tmp_path: Path) -> None:
    run, raw = finish(tmp_path)
    axes = {"connector": SWEEP["axes"]["projector"], "speed": SWEEP["axes"]["rate"]}
    content = {**SWEEP, "axes": {"new": {"old": {}, "other": {"skip_stage1": True}}, **axes}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    table = make_table(SweepRun(read_sweep(tmp_path / "sweep.yaml"), run.out))
    assert table.missing == 3
    assert table.rows[0].numbers["error"].mean == pytest.approx(raw["mlp", "usual"].mean(0)[2])


def test_a_number_is_found_by_its_path(tmp_path: Path) -> None:
    scores = {"reading": {"covered": {"0.15": {"words": 0.25}, "0.3": {"words": 0.75}}}, "counting": {"error": None}}

    def measure(path: Any) -> Measure:
        return Measure.model_validate({"run": "probe reading", "numbers": {"n": path}})

    assert numbers(measure("reading.covered.0.15.words"), scores) == {"n": 25}
    assert numbers(measure(["reading.covered.0.15.words", "reading.covered.0.3.words"]), scores) == {"n": 50}
    assert numbers(measure("counting.error"), scores) == {"n": None}
    with pytest.raises(UsageError, match=r"no number reading\.covered\.0\.3\.word .*did you mean reading\.covered"):
        numbers(measure("reading.covered.0.3.word"), scores)
