"""What all ranks must see alike before they train: the output folder, and where they resume."""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

from anyres_vlm.config import StageName
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.train.checkpoint import newest_step, read_finished
from anyres_vlm.train.options import CONFIG_FILE, model_folder

if TYPE_CHECKING:  # start-up time: `anyres estimate` plans without an engine
    from anyres_vlm.train.engine.engine import Engine

STALE_S = (5.0, 10.0, 20.0, 30.0)  # waits before looking again: NFS clients trust what they know for up to 60 s


def require_shared(engine: Engine, output: Path) -> None:
    """Raise `UsageError` on every rank if any does not see what rank 0 writes into the output folder."""
    if engine.world_size == 1:
        return
    # A new name: no client can remember it as missing.
    probe = output / f".seen-by-all-ranks-{engine.gather(secrets.token_hex(4))[0]}"
    if engine.is_main:
        output.mkdir(parents=True, exist_ok=True)
        probe.touch()
    engine.wait()
    try:
        agree(engine, output, lambda: f"{'the' if probe.exists() else 'no'} file that rank 0 has just written")
    finally:
        if engine.is_main:
            probe.unlink(missing_ok=True)


def agree(engine: Engine, output: Path, view: str | Callable[[], str], waits_s: Sequence[float] = ()) -> None:
    """Raise `UsageError` on every rank, naming two views, unless all ranks have the same view.

    A view that is called is taken again after each of the waits.
    """
    odd, views = 0, []
    where = f"{output.absolute()} on {socket.gethostname()}"
    for wait_s in (0.0, *waits_s):
        time.sleep(wait_s)
        views = engine.gather((view if isinstance(view, str) else view(), where))
        odd = next((rank for rank, (seen, _) in enumerate(views) if seen != views[0][0]), 0)
        if odd == 0:
            return
    (expected, there), (seen, here) = views[0], views[odd]
    raise UsageError(
        f"--output: rank 0 sees {expected} in {there}, rank {odd} sees {seen} in {here}: choose a folder that all "
        "nodes share; if they do share it, rerun when they see the same files"
    )


def describe_stages(output: Path) -> str:
    """Describe in a few words what an output folder holds of each stage."""
    return "; ".join(_describe_stage(output / stage) for stage in get_args(StageName))


def _describe_stage(folder: Path) -> str:
    try:
        finished = read_finished(folder)
    except DataError as error:  # raised again where it is read
        return str(error)
    step = newest_step(folder / "checkpoints")
    parts = [
        "its configuration" if (folder / CONFIG_FILE).exists() else "no configuration",
        "no checkpoint" if step is None else f"a checkpoint of step {step}",
        "a model" if model_folder(folder.parent, cast(StageName, folder.name)).is_dir() else "no model",
        "no record of its end" if finished is None else f"its end after {finished.steps} steps",
    ]
    return f"{folder.name} with {', '.join(parts)}"
