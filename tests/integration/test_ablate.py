"""A real sweep: a process is killed, two others resume, and the models equal those of plain runs of `train`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from anyres_vlm.ablate.sweep import expand, read_sweep
from anyres_vlm.cli.main import main
from anyres_vlm.config import StageName, load_config, shipped_config
from anyres_vlm.synthetic.dataset import write_dataset
from anyres_vlm.train.metrics import read_metrics
from anyres_vlm.train.options import RunOptions
from anyres_vlm.train.run import train


def write_sweep(bases: Path, folder: Path) -> Path:
    """Three cells of one seed: the baseline, one that differs in stage 2 alone, one without stage 1."""
    content: dict[str, Any] = {
        "base": str(shipped_config("tiny")),
        "set": {
            "model.llm": f"{bases}/llm",
            "model.encoder.name": f"{bases}/vit",
            "stage1.data.samples": 30,
            "stage2.data.samples": 40,
            "stage2.data.kinds": ["scene", "sign"],
            "stage1.max_length": 512,
            "stage1.capacity": 512,
            "save_every": 1,
            "workers": 0,
            "cache_features": str(folder / "features"),
        },
        "seeds": [4],
        "axes": {
            "mix": {"both": {}, "academic": {"set": {"stage2.data.rendered": "academic"}}},
            "stage 1": {"trained": {}, "skipped": {"skip_stage1": True}},
        },
        "measure": [{"run": "eval heldout", "rendered": 22, "numbers": {"right": "all", "signs": "sign"}}],
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def start(sweep: Path, out: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "anyres_vlm", "ablate", str(sweep), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums depend on it
    return subprocess.Popen(
        words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment, start_new_session=True
    )


def logs(out: Path) -> str:
    return "\n".join(path.read_text() for path in out.glob("*/*/log.txt"))


def kill_in_stage2(process: subprocess.Popen[str], out: Path) -> None:
    """Kill a sweep and its child in the middle of stage 2 of a cell, as a power cut would."""
    deadline = time.monotonic() + 300  # one minute when the machine is idle
    try:
        while not list(out.glob("cells/*/stage2/checkpoints/step-*")):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, logs(out)
            time.sleep(0.005)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.mark.slow
def test_two_processes_after_a_kill_give_the_numbers_of_plain_runs(tiny_bases: Path, tmp_path: Path) -> None:
    sweep, out = write_sweep(tiny_bases, tmp_path), tmp_path / "out"
    kill_in_stage2(start(sweep, out), out)
    for process in [start(sweep, out), start(sweep, out)]:
        _, messages = process.communicate(timeout=300)
        assert process.returncode == 0, messages + logs(out)
    assert logs(out).count("--stage 1") == 1, "stage 1 is trained once for both cells that need it"
    assert logs(out).count("--stage 2") == 3 + 1, "and stage 2 once a cell, but for the one that was killed"
    assert logs(out).count("anyres eval") == 3
    assert_cells_are_what_they_say(out)
    table = json.loads((out / "table.json").read_text())
    for row, cell in zip(table["rows"], expand(read_sweep(sweep)), strict=True):
        plain = tmp_path / "plain" / cell.name
        stages: tuple[StageName, ...] = ("stage2",) if cell.skip_stage1 else ("stage1", "stage2")
        train(cell.config, RunOptions(plain, stages, skip_stage1=cell.skip_stage1), lambda *step: None)
        expected = load_file(plain / "stage2" / "model" / "model.safetensors")
        found = load_file(out / "cells" / cell.name / "stage2" / "model" / "model.safetensors")
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert row["choices"] == cell.choices
        assert row["numbers"]["right"]["by_seed"] == {"4": 100 * accuracy(plain / "stage2" / "model", tmp_path)}


def accuracy(model: Path, folder: Path) -> float:
    """Of the held-out questions that the sweep has asked."""
    data = write_dataset(folder / "questions", "heldout", 22, 0)
    out = model.parent / "accuracy.json"
    assert main(["eval", "heldout", "--model", str(model), "--data", str(data), "--out", str(out)]) == 0
    return float(json.loads(out.read_text())["scores"]["all"])


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> None:
    """accelerate keeps one state a process, and other tests' runs differ in precision."""
    AcceleratorState._reset_state(reset_partial_state=True)


def assert_cells_are_what_they_say(out: Path) -> None:
    cells = {path.name.split("-seed")[0]: path for path in (out / "cells").iterdir()}
    assert set(cells) == {"baseline", "mix_academic", "stage_1_skipped"}
    (first,) = (out / "stage1").iterdir()
    assert (cells["baseline"] / "stage1").resolve() == (cells["mix_academic"] / "stage1").resolve()
    assert not (cells["stage_1_skipped"] / "stage1").exists()
    for name, cell in cells.items():
        config = load_config(cell / "stage2" / "config.yaml")
        assert config.seed == 4
        assert config.stage2.data.rendered == ("academic" if name == "mix_academic" else "instructions")
        data = cell / "data" / str(config.stage2.data.rendered)
        assert data.is_symlink(), "what is rendered is shared, and not rendered again by the run"
        assert (data / "data.json").exists()
        assert not (cell / "stage2" / "checkpoints").exists()
    weights = {name: load_file(cell / "stage2" / "model" / "model.safetensors") for name, cell in cells.items()}
    projector = "multi_modal_projector.linear_1.weight"
    aligned = load_file(first / "stage1" / "model" / "model.safetensors")[projector]
    moved = {name: (tensors[projector] - aligned).abs().max() for name, tensors in weights.items()}
    assert 0 < moved["baseline"] < moved["stage_1_skipped"]
    rows = read_metrics(cells["mix_academic"] / "stage2" / "metrics.jsonl")
    assert sum(row["cache/hits"] for row in rows) > 0, "the features of another cell's pictures"


@pytest.mark.slow
def test_a_signal_leaves_the_sweep_to_go_on(tiny_bases: Path, tmp_path: Path) -> None:
    process = start(write_sweep(tiny_bases, tmp_path), tmp_path / "out")
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").glob("stage1/*/stage1/metrics.jsonl")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 75, messages
    assert "interrupted: " in messages
    assert "rerun to resume" in messages


@pytest.mark.slow
def test_a_cell_that_fails_leaves_the_others_their_table(tiny_bases: Path, tmp_path: Path) -> None:
    sweep = write_sweep(tiny_bases, tmp_path)
    content = yaml.safe_load(sweep.read_text())
    content["launch"] = f"{sys.executable} -m"  # a launcher of one rank
    content["axes"] = {"template": {"plain": {"skip_stage1": True}, "none": {"set": {"model.llm": "no/such/model"}}}}
    sweep.write_text(yaml.safe_dump(content))
    process = start(sweep, tmp_path / "out")
    _, messages = process.communicate(timeout=120)
    assert process.returncode == 1, messages
    assert "no/such/model" in messages
    assert "error: 2 of 3 runs failed" in messages  # its stage 1 and what needs it
    table = (tmp_path / "out" / "table.md").read_text()
    assert "Not finished: 1 of 2 runs are missing." in table
