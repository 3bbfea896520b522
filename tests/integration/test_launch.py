"""configs/cluster/launch, what every containerised job runs: two nodes meet, leave together with 75, and go on."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from anyres_vlm.train.metrics import read_metrics
from anyres_vlm.train.options import MARKER

ROOT = Path(__file__).parents[2]
SETTINGS = ("stage1.data.samples=800", "stage1.max_length=512", "stage1.capacity=512", "save_every=1000")

pytestmark = pytest.mark.slow


def start(output: Path, bases: Path, nodes: int) -> list[subprocess.Popen[bytes]]:
    """So many nodes of one rank each, the one that the others look for last."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    names = (f"model.llm={bases}/llm", f"model.encoder.name={bases}/vit", "stage1.packs_per_step=2", *SETTINGS)
    words = [word for name in names for word in ("--set", name)]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "OUTPUT": str(output),
        "PET_NNODES": str(nodes),
        "PET_NPROC_PER_NODE": "1",
        "PET_MASTER_ADDR": "localhost",
        "PET_MASTER_PORT": str(port),
    }
    command = [ROOT / "configs/cluster/launch", "--stage", "1", *words]
    return [subprocess.Popen(command, env=environment) for _ in range(nodes)]


def await_step(output: Path, nodes: list[subprocess.Popen[bytes]]) -> None:
    rows = output / "stage1" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (rows.exists() and rows.read_text()):
        assert all(node.poll() is None for node in nodes)
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(("nodes", "number"), [(2, signal.SIGTERM), (1, signal.SIGUSR1)])
def test_a_signal_to_one_node_ends_all_with_75_and_they_go_on(tiny_bases, tmp_path, nodes: int, number: int) -> None:
    run = tmp_path / "run"
    launched = start(run, tiny_bases, nodes)
    await_step(run, launched)
    launched[-1].send_signal(number)
    assert [node.wait(300) for node in launched] == [os.EX_TEMPFAIL] * nodes
    saved = len(read_metrics(run / "stage1" / "metrics.jsonl"))
    assert f"stage1 is saved after step {saved} of " in (run / MARKER).read_text()
    assert [node.wait(300) for node in start(run, tiny_bases, nodes)] == [0] * nodes
    assert not (run / MARKER).exists()
    steps = [row["step"] for row in read_metrics(run / "stage1" / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > saved > 0


def test_a_mistake_is_not_taken_for_an_interruption(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / MARKER).write_text("of an earlier run\n")
    (node,) = start(run, tmp_path / "nothing", 1)
    assert node.wait(300) == 1
    assert not (run / MARKER).exists()
