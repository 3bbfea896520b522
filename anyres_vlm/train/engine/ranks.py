"""How the ranks of a run find one another under `srun`, and how the loss of one is told."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch.distributed import DistError

from anyres_vlm.errors import RankLost

FIRST_PORT, PORTS = 20_000, 10_000  # below the ports that Linux hands out by itself
GLOO = re.compile(r"/gloo/")  # its errors are plain ones that begin with the source file


def adopt_slurm_ranks() -> None:
    """Set RANK and what goes with it from `srun`'s variables, unless a launcher or the user has set RANK.

    In a batch script without `srun` a process is no rank.
    """
    if "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return
    for name, value in slurm_ranks(os.environ).items():
        os.environ.setdefault(name, value)


def slurm_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """The rank, the world and the first node's address in torch's words.

    The port follows from job and step, so that jobs that share a node do not meet.
    """
    job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "MASTER_ADDR": first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(FIRST_PORT + (10 * job + step) % PORTS),
    }


def first_host(hosts: str) -> str:
    """The first name of Slurm's short form of a list: `gpu[007-010,12],cpu1` -> `gpu007`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", hosts)
    assert first is not None, "srun names its nodes"
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])


@contextmanager
def telling_lost_ranks(timeout_minutes: float) -> Iterator[None]:
    """Raises `RankLost` where the block fails because another rank is gone, or silent for longer than it may be."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, DistError) and GLOO.search(str(error)) is None:
            raise
        reason = " ".join(str(error).split())
        raise RankLost(
            f"another rank has ended, or was silent for rank_timeout_minutes={timeout_minutes:g}: see what it said "
            f"last; the same command goes on from the newest checkpoint ({reason})"
        ) from error
