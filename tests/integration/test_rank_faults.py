"""Two gloo ranks with private output folders, and a rank that is signalled while it waits for one that is stopped."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from anyres_vlm.train.options import MARKER

# `anyres train`, with a shorter limit.
TRAIN = """
import sys
from anyres_vlm.cli import main
from anyres_vlm.train import signals

signals.Watchdog.__init__.__defaults__ = (3.0,)
sys.exit(main.main(sys.argv[1:]))
"""


def start(bases: Path, outputs: list[Path], *more: str) -> list[subprocess.Popen[str]]:
    """One rank with each of the output folders."""
    sets = [f"model.llm={bases}/llm", f"model.encoder.name={bases}/vit", "stage1.data.samples=60", *more]
    sets += ["stage1.max_length=512", "stage1.capacity=512", "stage1.packs_per_step=2"]
    words = [word for setting in sets for word in ("--set", setting)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": str(len(outputs)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", TRAIN, "train", "--stage", "1", "--output", str(output), *words],
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, output in enumerate(outputs)
    ]


def test_private_output_folders_end_the_run(tiny_bases, tmp_path: Path) -> None:
    outputs = [tmp_path / "first", tmp_path / "second"]
    processes = start(tiny_bases, outputs)
    ends = [process.communicate(timeout=180)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], ends
    for end in ends:
        (line,) = [line for line in end.splitlines() if line.startswith("error: ")]
        for rank, files, output in ((0, "the file", outputs[0]), (1, "no file", outputs[1])):
            assert re.search(rf"rank {rank} sees {files} that rank 0 has just written in {output} on ", line), line
    assert not [path for output in outputs for path in output.rglob("*")]


def test_a_signalled_rank_does_not_wait_for_a_stopped_one(tiny_bases, tmp_path: Path) -> None:
    output = tmp_path / "run"
    ranks = start(tiny_bases, [output, output], "stage1.epochs=50", "save_every=1")
    try:
        deadline = time.monotonic() + 180
        while not any(output.glob("stage1/checkpoints/step-*")):
            assert all(rank.poll() is None for rank in ranks)
            assert time.monotonic() < deadline
            time.sleep(0.02)
        ranks[1].send_signal(signal.SIGSTOP)
        time.sleep(1)
        ranks[0].send_signal(signal.SIGTERM)
        sent = time.monotonic()
        _, errors = ranks[0].communicate(timeout=90)
        assert ranks[0].returncode == os.EX_TEMPFAIL, errors
        assert 3 < time.monotonic() - sent < 60  # rank_timeout_minutes is 30
        step = max(int(path.name[-7:]) for path in output.glob("stage1/checkpoints/step-*"))
        last = errors.strip().splitlines()[-1]
        assert last.startswith("interrupted: the run did not stop within "), errors
        assert last.endswith(f", stage1 after step {step}; rerun the same command to resume"), errors
        assert f"stage1 after step {step}" in (output / MARKER).read_text()
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
