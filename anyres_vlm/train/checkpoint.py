"""Checkpoints of a running stage: atomic, complete, and refused where they belong to another run.

A checkpoint is a model folder as `model.pretrained` writes it, with the trained weights in fp32, plus `trainer/` with
the optimizer's moments by parameter name and the number of finished steps. All else follows from that number and the
configuration: the plan of the steps, the learning rate, the seed of each step. So a checkpoint does not depend on the
number of ranks that wrote it, or on their ZeRO stage.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from anyres_vlm.durable import sync
from anyres_vlm.errors import DataError, UsageError

logger = logging.getLogger(__name__)

PREFIX = "step-"
STATE_FILE = "state.json"
MOMENTS_FILE = "moments.safetensors"


@dataclass(frozen=True)
class TrainerState:
    """What resumes a stage beside its tensors; `settings` fix the sequence of steps."""

    step: int
    updates: int  # fewer than the steps where some were not finite
    settings: dict[str, Any]


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder appear complete or not at all: written beside, flushed to disk, renamed.

    Raises `DataError` where it cannot be written; what stood there before still does.
    """
    try:
        _write_folder(folder, fill)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{folder} cannot be written ({error}): what was saved before is whole; make room or mend the folder, and "
            "the same command goes on"
        ) from error


def _write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        fill(partial)
        for path in [*partial.rglob("*"), partial]:
            sync(path)
    except BaseException:  # a full disk above all: what was written so far would keep it full
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    sync(folder.parent)


def save_trainer(folder: Path, state: TrainerState, moments: dict[str, Tensor]) -> None:
    """Write `trainer/` into a checkpoint folder that is being filled."""
    trainer = folder / "trainer"
    trainer.mkdir()
    save_file(moments, trainer / MOMENTS_FILE)
    (trainer / STATE_FILE).write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")


def read_state(folder: Path) -> TrainerState:
    """The state of a checkpoint whose files are all whole. Raises `DataError` where they are not."""
    try:
        content = json.loads((folder / "trainer" / STATE_FILE).read_text(encoding="utf-8"))
        state = TrainerState(step=content["step"], updates=content["updates"], settings=content["settings"])
        if not (type(state.step) is type(state.updates) is int and type(state.settings) is dict):
            raise ValueError(f"{STATE_FILE} holds other types")
        for path in _tensor_files(folder):
            with safe_open(path, framework="pt"):  # reads the header, and that the file is as long as it says
                pass
    except (OSError, KeyError, TypeError, ValueError, RecursionError, SafetensorError) as error:
        raise DataError(f"{folder}: not a whole checkpoint ({error})") from None
    return state


@contextmanager
def tensors(folder: Path) -> Iterator[Callable[[str], Tensor]]:
    """Read a checkpoint's tensors by name, moments as `NAME.exp_avg`; none is in memory before it is asked for.

    What is read raises `DataError` for a tensor that is not there.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in _tensor_files(folder)]
        by_name = {name: file for file in files for name in file.keys()}  # noqa: SIM118

        def read(name: str) -> Tensor:
            if name not in by_name:
                raise DataError(f"{folder}: {name} is missing; delete it to go on from the checkpoint before")
            tensor: Tensor = by_name[name].get_tensor(name)
            return tensor

        yield read


def _tensor_files(folder: Path) -> list[Path]:
    return [*sorted(folder.glob("*.safetensors")), folder / "trainer" / MOMENTS_FILE]


def require_same_settings(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises `UsageError` if a folder was written by a run of other settings."""
    for key in sorted(now):
        if now[key] != before.get(key):
            raise UsageError(
                f"{folder} was written with {key}={before.get(key)!r}, now it is {now[key]!r}: "
                "go on with the same settings or choose another --output"
            )


def latest(folder: Path) -> tuple[Path, TrainerState] | None:
    """The newest whole checkpoint in a folder of checkpoints; broken ones are passed over with a warning.

    Raises `DataError` where all are broken: beginning again would throw away what may still be mended.
    """
    broken: DataError | None = None
    for path in sorted(folder.glob(f"{PREFIX}*") if folder.is_dir() else [], key=_step, reverse=True):
        try:
            return path, read_state(path)
        except DataError as error:
            logger.warning("%s: going on from the one before", error)
            broken = error
    if broken is not None:
        raise DataError(f"{broken}, and no other is left: delete {folder} to begin again")
    return None


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"{PREFIX}{step:07d}"


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for old in sorted(folder.glob(f"{PREFIX}*"), key=_step)[:-keep]:
        shutil.rmtree(old)
        logger.debug("deleted %s", old)


def _step(path: Path) -> int:
    digits = path.name.removeprefix(PREFIX)
    return int(digits) if re.fullmatch("[0-9]{1,18}", digits) else -1  # someone else's, behind all of ours
