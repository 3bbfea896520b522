"""Jobs of a sweep: each runs once whoever works on them, and a process that dies leaves its work to others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from anyres_vlm.ablate.jobs import Job, claim, work
from anyres_vlm.errors import DataError

WORKER = """
import os, sys, time
from functools import partial
from pathlib import Path
from anyres_vlm.ablate.jobs import Job, work
out = Path(sys.argv[1])

def run(name, lock):
    with (out / "log").open("a") as log:
        log.write(f"begin {name} {os.getpid()}\\n")
    time.sleep(float(sys.argv[2]))
    with (out / "log").open("a") as log:
        log.write(f"end {name} {os.getpid()}\\n")
    (out / name / "done").touch()

def job(name, *needs):
    return Job(out / name, (out / name / "done").exists, partial(run, name), needs)

first = [job(f"first-{number}") for number in range(3)]
cells = [job(f"cell-{number}", first[number % 3]) for number in range(9)]
assert not work([*first, *cells], lambda: time.sleep(0.01))
"""


def worker(out: Path, seconds: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", WORKER, str(out), str(seconds)])


def events(out: Path) -> list[list[str]]:
    return [line.split() for line in (out / "log").read_text().splitlines()] if (out / "log").exists() else []


def wait_for_events(out: Path, count: int) -> None:
    deadline = time.monotonic() + 30
    while len(events(out)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_two_processes_do_each_job_once_and_both_end(tmp_path: Path) -> None:
    workers = [worker(tmp_path, 0.05) for _ in range(2)]
    assert [process.wait(30) for process in workers] == [0, 0]
    found = events(tmp_path)
    begun = [name for event, name, _ in found if event == "begin"]
    assert sorted(begun) == sorted([f"first-{n}" for n in range(3)] + [f"cell-{n}" for n in range(9)])
    assert len({pid for *_, pid in found}) == 2, "both worked"
    ended: set[str] = set()
    for event, name, _ in found:
        if event == "begin" and name.startswith("cell"):
            assert f"first-{int(name[-1]) % 3}" in ended, "what a job needs is there before it begins"
        if event == "end":
            ended.add(name)


def test_a_killed_process_leaves_its_job_to_another(tmp_path: Path) -> None:
    killed = worker(tmp_path, 60)
    wait_for_events(tmp_path, 1)
    other = worker(tmp_path, 0.0)
    wait_for_events(tmp_path, 9)  # begin and end of the two firsts that are left and of two of their cells
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert other.wait(30) == 0
    taken = [pid for event, name, pid in events(tmp_path) if event == "begin" and name == "first-0"]
    assert taken == [str(killed.pid), str(other.pid)]


def test_a_child_keeps_the_claim_of_its_killed_parent(tmp_path: Path) -> None:
    with claim(tmp_path) as lock:
        assert lock is not None
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    with claim(tmp_path) as lock:
        assert lock is None
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with claim(tmp_path) as lock:
        assert lock is not None


def test_a_failure_takes_its_dependents_along_and_no_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def run(name: str, lock: int) -> None:
        if name == "bad":
            raise DataError("out of memory")
        (tmp_path / name / "done").touch()

    def job(name: str, *needs: Job) -> Job:
        return Job(tmp_path / name, (tmp_path / name / "done").exists, partial(run, name), needs)

    bad, good = job("bad"), job("good")
    after_bad, after_good = job("after bad", bad), job("after good", good)
    assert work([bad, after_bad, good, after_good], lambda: None) == [bad, after_bad]
    assert after_good.is_done()
    assert "bad failed: out of memory" in caplog.text
