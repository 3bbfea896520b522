"""Jobs that any number of processes do together, each once, in an order that what they need is there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from anyres_vlm.ablate.claim import claim
from anyres_vlm.errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A piece of work with a folder of its own. `run` gets the open lock of the folder, for children to inherit."""

    folder: Path
    is_done: Callable[[], bool]
    run: Callable[[int], None]
    needs: tuple[Job, ...] = ()


def work(jobs: Sequence[Job], pause: Callable[[], None]) -> list[Job]:
    """Do jobs until all are done, here or in other processes. Returns those that failed, or whose needs did.

    A `DataError` fails a job and the others go on; anything else ends the work. `pause` waits while other processes
    have all that is left.
    """
    failed: list[Job] = []
    while True:
        failed += [job for job in jobs if job not in failed and any(need in failed for need in job.needs)]
        left = [job for job in jobs if job not in failed and not job.is_done()]
        if not left:
            return failed
        ready = (job for job in left if all(need.is_done() for need in job.needs))
        if not any(_attempt(job, failed, f"{len(left)} of {len(jobs)} are left") for job in ready):
            pause()


def _attempt(job: Job, failed: list[Job], left: str) -> bool:
    """Whether the job was ours to do."""
    with claim(job.folder) as lock:
        if lock is None:
            return False
        try:
            if not job.is_done():  # another process may have ended it a moment ago
                logger.info("%s begins; %s", job.folder.name, left)
                job.run(lock)
        except DataError as error:
            logger.error("%s failed: %s", job.folder.name, error)
            failed.append(job)
        return True
