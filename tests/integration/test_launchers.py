"""Two ranks under every launcher by the same command, and a rank that dies or falls silent: the others end."""

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

ENDED_S = 60  # after a rank has died; most of it is Python's own end on a busy machine, gloo notices at once


def command(bases: Path, output: Path, *more: str) -> list[str]:
    """The command behind `python`."""
    sets = [
        f"model.llm={bases}/llm",
        f"model.encoder.name={bases}/vit",
        "stage1.data.samples=60",
        "stage1.max_length=512",
        "stage1.capacity=512",
        "stage1.packs_per_step=2",
        *more,
    ]
    words = [word for setting in sets for word in ("--set", setting)]
    return ["-m", "anyres_vlm", "train", "--stage", "1", "--output", str(output), *words]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start(variables: dict[str, str], words: list[str], log: Path) -> subprocess.Popen[bytes]:
    """One rank, told by variables alone."""
    with log.open("wb") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
        return subprocess.Popen([sys.executable, *words], env=environment, stdout=file, stderr=file)


def lose(bases: Path, folder: Path, number: signal.Signals, victim: int, *more: str) -> tuple[float, int, str]:
    """Send a rank a signal behind the first step. Returns in how many seconds the other ended, its status and words."""
    words = command(bases, folder / "run", "stage1.epochs=50", *more)
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    ranks = [
        start({**world, "RANK": str(rank), "LOCAL_RANK": str(rank)}, words, folder / f"{rank}.log") for rank in range(2)
    ]
    rows = folder / "run" / "stage1" / "metrics.jsonl"
    deadline = time.monotonic() + 180
    while not (rows.exists() and rows.read_text()):
        assert time.monotonic() < deadline
        assert all(rank.poll() is None for rank in ranks), (folder / "0.log").read_text()
        time.sleep(0.01)
    ranks[victim].send_signal(number)
    sent = time.monotonic()
    try:
        status = ranks[1 - victim].wait(180)
        return time.monotonic() - sent, status, (folder / f"{1 - victim}.log").read_text()
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_rank_ends_the_other(tiny_bases, tmp_path: Path, victim: int) -> None:
    seconds, status, said = lose(tiny_bases, tmp_path, signal.SIGKILL, victim)
    assert seconds < ENDED_S
    assert status == 1
    last = said.strip().splitlines()[-1]
    lost = "error: another rank has ended, or did not answer for rank_timeout_minutes=30: "
    assert last.startswith(lost), said[-2000:]


@pytest.mark.slow
def test_a_silent_rank_ends_the_other_after_the_limit(tiny_bases, tmp_path: Path) -> None:
    seconds, status, said = lose(tiny_bases, tmp_path, signal.SIGSTOP, 1, "rank_timeout_minutes=1")
    assert 55 < seconds < 60 + ENDED_S
    assert status == 1
    assert "silent for rank_timeout_minutes=1: " in said


LAUNCHERS = {
    "torchrun": "torchrun --standalone --nproc-per-node 2",
    "accelerate": "accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no",
    "deepspeed": "deepspeed --num_gpus 2 --master_port {port} --module",
}


def assert_two_ranks_trained(output: Path, said: str) -> None:
    assert "on 2 ranks" in said
    assert len(read_metrics(output / "stage1" / "metrics.jsonl")) == 2


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_run_the_same_command(tiny_bases, tmp_path: Path, launcher: str) -> None:
    words = LAUNCHERS[launcher].format(port=free_port()).split()
    own = command(tiny_bases, tmp_path / "run")[launcher == "deepspeed" :]  # its --module is the -m of the others
    binary = Path(sys.executable).with_name(words[0])
    done = subprocess.run(
        [str(binary), *words[1:], *own, "--max-steps", "2"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{binary.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert_two_ranks_trained(tmp_path / "run", done.stderr)


def test_srun_s_variables_are_enough(tiny_bases, tmp_path: Path) -> None:
    """What `srun --ntasks=2` sets; the real one is tried with the job scripts."""
    step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    step["SLURM_STEP_NODELIST"] = "localhost"
    words = [*command(tiny_bases, tmp_path / "run"), "--max-steps", "2"]
    ranks = [
        start({**step, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}, words, tmp_path / f"{rank}.log")
        for rank in range(2)
    ]
    for rank, process in enumerate(ranks):
        assert process.wait(300) == 0, (tmp_path / f"{rank}.log").read_text()[-3000:]
    assert_two_ranks_trained(tmp_path / "run", (tmp_path / "0.log").read_text())
