#!/usr/bin/env python3
"""Run the project's sbatch script on a small Slurm cluster, interrupt it, and check that the result stays the same.

Started by tools/check/slurm, which makes the private namespaces that it must run in.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

from safetensors.torch import load_file
from slurm_cluster import GRACE_S, SlurmCluster, run

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "configs" / "cluster" / "slurm" / "train.sbatch"
STEPS, DISTURBED_STEP = 40, 15
SETTINGS = {
    "stage1.data.samples": "640",
    "stage1.max_length": "512",
    "stage1.capacity": "512",
    "stage1.packs_per_step": "6",  # divisible by 2 and 3 ranks
    "save_every": "10",
    "workers": "1",  # loader processes get the signals of the job, too
}
TIMEOUT_S = 1200
LOOK_S = 30  # interval at which Slurm checks time limits
# Another number of ranks adds the same fp32 numbers in another order, and AdamW propagates it. Measured: 1.1e-6.
ATOL = 1e-5


@dataclass(frozen=True)
class Scenario:
    """A job on `nodes` nodes, how it is disturbed, and how it must end."""

    name: str
    nodes: int
    disturb: Callable[[SlurmCluster, str], None] = lambda cluster, job: None
    requeued: int = 0
    resumed: int = 1  # by a requeue of Slurm, or within the job by torchrun
    state: str = "COMPLETED"
    is_equal: bool = True  # bit-exact; otherwise within ATOL
    environment: tuple[str, ...] = ()


def near_time_limit(cluster: SlurmCluster, job: str) -> None:
    """Lower the time limit so that Slurm warns at its next check, then raise it to an hour again."""
    run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes_run(cluster, job) + 2}")
    trainers = ("--full", "--", "-u -m anyres_vlm train")  # only in this process namespace
    run("pkill", "-STOP", *trainers)  # otherwise the remaining steps would finish before the check
    time.sleep(LOOK_S + 1)
    run("pkill", "-CONT", *trainers)
    wait(lambda: cluster.job(job)["Restarts"] == "1", f"job {job} is requeued")
    run("scontrol", "update", f"JobId={job}", "TimeLimit=60")


def preempt(cluster: SlurmCluster, job: str) -> None:
    """Submit a job of higher priority that needs every node."""
    cluster.submit("--partition=urgent", f"--nodes={len(cluster.nodes)}", "--output=/dev/null", "--wrap=sleep 1")


def preempt_at_once(cluster: SlurmCluster, job: str) -> None:
    """Preempt on a partition without a grace time."""
    run("scontrol", "update", "PartitionName=normal", "GraceTime=0")
    preempt(cluster, job)


def kill_first_node(cluster: SlurmCluster, job: str) -> None:
    """Kill the node with the batch script and the rendezvous."""
    cluster.kill_node(nodes_of(cluster, job)[0])


def kill_last_node(cluster: SlurmCluster, job: str) -> None:
    """Kill a node that only runs trainers."""
    cluster.kill_node(nodes_of(cluster, job)[-1])


def kill_and_replace(cluster: SlurmCluster, job: str) -> None:
    """Kill a node that the job needs, and start it again when the job waits for it."""
    killed = nodes_of(cluster, job)[-1]
    cluster.kill_node(killed)
    wait(lambda: cluster.job(job)["Restarts"] == "1", f"job {job} is requeued")
    cluster.start_node(killed)


def cancel(cluster: SlurmCluster, job: str) -> None:
    """Cancel the job, as a user does."""
    run("scancel", job)


# torchrun gives up on a missing node after a minute, not ten.
SHORT_WAIT = ("MIN_NODES=2", "PET_RDZV_CONF=join_timeout=60")
SCENARIOS = (
    Scenario("normal end", 2, resumed=0),
    Scenario("USR1 before the time limit", 2, near_time_limit, requeued=1),
    Scenario("preemption", 2, preempt, requeued=1),
    Scenario("a node killed", 3, kill_last_node, is_equal=False),
    Scenario("first node killed", 2, kill_first_node, requeued=1),
    Scenario("a node killed, MIN_NODES=2", 2, kill_and_replace, requeued=1, environment=SHORT_WAIT),
    Scenario("preemption without grace", 2, preempt_at_once, requeued=1),
    Scenario("scancel", 2, cancel, resumed=0, state="CANCELLED"),
)


def main() -> int:
    """Run the scenarios. Returns 0 if each ended as it must."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="those whose name has one of the words")
    parser.add_argument("--folder", type=Path, help="where logs and runs go; without it a temporary folder")
    arguments = parser.parse_args()
    if "slurm_scenarios" not in Path("/proc/1/cmdline").read_text():
        parser.error("without private namespaces it would change this machine's network: run tools/check/slurm")
    folder = (arguments.folder or Path(mkdtemp(prefix="slurm-"))).resolve()
    chosen = [s for s in SCENARIOS[1:] if not arguments.only or any(word in s.name for word in arguments.only)]
    print(f"logs and runs are in {folder}", flush=True)
    cluster = SlurmCluster(folder / "cluster", num_nodes=3)
    cluster.start()
    rows = [["scenario", "nodes", "requeued", "resumed", "job ends", "final weights", "minutes"], ["---"] * 7]
    failures = []
    for number, scenario in enumerate((SCENARIOS[0], *chosen)):
        started = time.monotonic()
        try:
            cells = play(cluster, scenario, folder / f"{number}", undisturbed=folder / "0" / "run")
        except (AssertionError, RuntimeError) as error:
            failures.append(f"{scenario.name}: {error}; see {folder / str(number)}")
            cells = ["", "", "", "FAILED", ""]
            run("scancel", "--user=root")
        rows.append([scenario.name, *cells, f"{(time.monotonic() - started) / 60:.1f}"])
        print(*rows[-1], sep=", ", flush=True)
        run("scontrol", "update", "PartitionName=normal", f"GraceTime={GRACE_S}")
        for node in cluster.nodes:
            cluster.start_node(node)
        cluster.wait_for_nodes()
    print(*(f"| {' | '.join(row)} |" for row in rows), *failures, sep="\n")
    return len(failures) > 0


def play(cluster: SlurmCluster, scenario: Scenario, folder: Path, undisturbed: Path) -> list[str]:
    """Run one scenario. Raises `AssertionError` or `RuntimeError` if it does not end as it must."""
    folder.mkdir(parents=True)
    job, log = submit(cluster, scenario, folder), folder / "job.log"
    metrics = folder / "run" / "stage1" / "metrics.jsonl"
    wait(lambda: ended(cluster, job) or count_lines(metrics) >= DISTURBED_STEP, f"step {DISTURBED_STEP}")
    scenario.disturb(cluster, job)
    wait(lambda: ended(cluster, job), f"job {job} ends")
    found, text = cluster.job(job), log.read_text()
    resumed = len(re.findall(r"stage1: .* resumed after step", text))
    ranks = re.findall(r"straggler factor \S+ on (\d+) rank", text)
    assert found["JobState"] == scenario.state, f"the job is {found['JobState']}, expected {scenario.state}"
    assert int(found["Restarts"]) == scenario.requeued, f"requeued {found['Restarts']} times"
    assert resumed == scenario.resumed, f"resumed {resumed} times, expected {scenario.resumed}"
    weights = "-"
    if scenario.state == "COMPLETED":
        difference = furthest(folder / "run", undisturbed)
        assert difference <= (0 if scenario.is_equal else ATOL), f"weights differ by up to {difference:.1e}"
        weights = f"differ by {difference:.1e} at most" if difference else "equal"
        weights = "compared with" if folder / "run" == undisturbed else weights
    return [", then ".join(ranks), found["Restarts"], str(resumed), found["JobState"], weights]


def submit(cluster: SlurmCluster, scenario: Scenario, folder: Path) -> str:
    """Submit the project's script as a user does, with sizes for this small cluster."""
    os.environ.update(OUTPUT=str(folder / "run"), VENV=sys.prefix, OMP_NUM_THREADS="1")
    sizes = (f"--nodes={scenario.nodes}", "--gpus-per-node=1", "--cpus-per-task=1", "--time=60", "--signal=B:USR1@120")
    more = (f"--export={','.join(('ALL', *scenario.environment))}", f"--output={folder}/job.log")
    command = ["--stage", "1", "--max-steps", str(STEPS), "--deepspeed", "zero2"]
    settings = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
    return cluster.submit(*sizes, *more, str(SCRIPT), *command, *settings)


def ended(cluster: SlurmCluster, job: str) -> bool:
    """Return whether a job has ended for good; a requeued job also ends for a moment."""
    for _ in range(3):
        if cluster.job(job)["JobState"] in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "PREEMPTED", "NODE_FAIL"):
            return False
        time.sleep(2)
    return True


def count_lines(path: Path) -> int:
    """Return the number of lines of a file, 0 if it does not exist yet."""
    return path.read_text().count("\n") if path.exists() else 0


def furthest(found: Path, expected: Path) -> float:
    """Return the largest difference between the final weights of two runs."""
    ours, theirs = (load_file(run / "stage1" / "model" / "model.safetensors") for run in (found, expected))
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - tensor).abs().max()) for name, tensor in theirs.items())


def nodes_of(cluster: SlurmCluster, job: str) -> list[str]:
    """Return the nodes of a job in order."""
    return run("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).split()


def minutes_run(cluster: SlurmCluster, job: str) -> int:
    """Return the whole minutes since a job started."""
    hours, minutes, _ = cluster.job(job)["RunTime"].split(":")
    return int(hours) * 60 + int(minutes)


def wait(is_reached: Callable[[], bool], what: str) -> None:
    """Wait for a condition, checked every second. Raises `RuntimeError` after twenty minutes."""
    deadline = time.monotonic() + TIMEOUT_S
    while not is_reached():
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited {TIMEOUT_S} s for: {what}")
        time.sleep(1)


if __name__ == "__main__":
    sys.exit(main())
