"""Checkpoints of a running stage: atomic, complete, and refused where they belong to another run.

A checkpoint is a model folder as `model.pretrained` writes it, with the trained weights in fp32, plus `trainer/` with
the optimizer's moments by parameter name and the number of finished steps. Everything else follows from that number
and the configuration: the plan of the steps, the learning rate, the seed of each step. So a checkpoint does not depend
on the number of ranks that wrote it, or on their ZeRO stage.

A finished stage keeps its last checkpoint, from which more steps can be trained, and `finished.json`.
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
from typing import Any, TypedDict

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from anyres_vlm.config import CheckpointConfig, ModelConfig, StageConfig, StageName
from anyres_vlm.errors import DataError, UsageError, shortened
from anyres_vlm.files import replacing, sync
from anyres_vlm.train.options import NOT_DECISIVE

logger = logging.getLogger(__name__)

PREFIX = "step-"
STATE_FILE = "state.json"
MOMENTS_FILE = "moments.safetensors"
FINISHED_FILE = "finished.json"
SHOWN_CHANGES = 4  # in a refusal


class DataFacts(TypedDict):
    """What is remembered of a stage's data, to notice and to name a change: fingerprint of its content, records."""

    fingerprint: str
    records: int


@dataclass(frozen=True)
class TrainerState:
    """What resumes a stage in addition to its tensors; `settings` fix the sequence of steps.

    `data` and `stage1_steps` (the steps that stage 1 had when stage 2 started from it) are None in checkpoints of older
    versions.
    """

    step: int
    updates: int  # fewer than the steps where some were not finite
    settings: dict[str, Any]
    data: DataFacts | None = None
    stage1_steps: int | None = None


@dataclass(frozen=True)
class Finished:
    """What a finished stage was: its steps, out of the `available` steps of so many epochs.

    `available` is None where an older version kept no record.
    """

    steps: int
    available: int | None
    epochs: int
    data: DataFacts | None = None
    stage1_steps: int | None = None


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Write a folder under a temporary name, flush it to disk and rename it: it appears complete or not at all.

    Raises `DataError` if it cannot be written; what was there before is left as it was.
    """
    try:
        _write_folder(folder, fill)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{folder} cannot be written ({error}): what was saved before is intact; make room or fix the folder, and "
            "rerun the same command to resume"
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
    except BaseException:  # on a full disk, what was written so far would keep it full
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
    """Read the state of a checkpoint whose files are all complete. Raises `DataError` if they are not."""
    try:
        content = json.loads((folder / "trainer" / STATE_FILE).read_text(encoding="utf-8"))
        state = TrainerState(
            step=content["step"],
            updates=content["updates"],
            settings=content["settings"],
            data=_data_facts(content.get("data")),
            stage1_steps=content.get("stage1_steps"),
        )
        counts = [state.step, state.updates, 0 if state.stage1_steps is None else state.stage1_steps]
        if not (all(type(count) is int for count in counts) and type(state.settings) is dict):
            raise ValueError(f"{STATE_FILE} holds other types")
        for path in _tensor_files(folder):
            with safe_open(path, framework="pt"):  # reads the header, and checks the length of the file against it
                pass
    except (OSError, AttributeError, KeyError, TypeError, ValueError, RecursionError, SafetensorError) as error:
        raise DataError(f"{folder}: not a whole checkpoint ({error})") from None
    return state


def _data_facts(content: Any) -> DataFacts | None:
    return None if content is None else {"fingerprint": str(content["fingerprint"]), "records": int(content["records"])}


@contextmanager
def tensors(folder: Path) -> Iterator[Callable[[str], Tensor]]:
    """Yield a reader of a checkpoint's tensors by name, moments as `NAME.exp_avg`, each read when it is asked for.

    The reader raises `DataError` for a tensor that is not there.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in _tensor_files(folder)]
        by_name = {name: file for file in files for name in file.keys()}  # noqa: SIM118

        def read(name: str) -> Tensor:
            if name not in by_name:
                raise DataError(f"{folder}: {name} is missing; delete it to resume from the checkpoint before it")
            tensor: Tensor = by_name[name].get_tensor(name)
            return tensor

        yield read


def _tensor_files(folder: Path) -> list[Path]:
    return [*sorted(folder.glob("*.safetensors")), folder / "trainer" / MOMENTS_FILE]


def require_same_settings(folder: Path, stage: StageName, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise `UsageError` naming each setting that differs from those that a folder was written with.

    The number of steps and epochs may differ: a stage can be trained further.
    """
    before = _with_defaults(before)
    changes = []
    for key in sorted((now.keys() & before.keys()) - {"epochs", "steps", "plan"}):
        path = f"{stage}.{key}" if key in StageConfig.model_fields else key
        for where, old, new in _changes(path, before[key], now[key]):
            changes.append(f"{where}: {_in_words(where, old)} before, {_in_words(where, new)} now")
    if not changes and now.get("plan") != before.get("plan"):
        changes = ["the samples have other lengths than before: the data, its images or the tokenizer changed"]
    changes.sort()
    if changes:
        more = f" and {len(changes) - SHOWN_CHANGES} more" if len(changes) > SHOWN_CHANGES else ""
        raise UsageError(
            f"{folder} belongs to other settings: {'; '.join(changes[:SHOWN_CHANGES])}{more}: resume with the settings "
            "of before, or choose another --output"
        )


def _with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """Fill in keys that the version which wrote the settings did not have yet."""
    own = {key: value for key, value in settings.items() if key in StageConfig.model_fields}
    model = settings.get("model", {})
    kind = CheckpointConfig if "checkpoint" in model else ModelConfig
    try:
        filled = StageConfig.model_validate(own).model_dump(mode="json", exclude=NOT_DECISIVE)
        if "image_position" not in settings.get("data", {}):
            del filled["data"]["image_position"]  # it was as_is, which `stage_settings` leaves out
        return {**settings, **filled, "model": kind.model_validate(model).model_dump(mode="json")}
    except ValidationError:  # keys that this version no longer has: compared as they are
        return settings


def _changes(path: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({**before, **now}):
            yield from _changes(f"{path}.{key}", before.get(key), now.get(key))
    elif before != now:
        yield path, before, now


def _in_words(path: str, value: Any) -> str:
    if value is None:  # `stage_settings` leaves `as_is` out
        return "as_is, the default of older versions," if path.endswith(".image_position") else "not set"
    return shortened(value)


def require_same_data(folder: Path, before: DataFacts | None, now: DataFacts | None) -> None:
    """Raise `UsageError` if the content of the data changed since a folder was written. None means not known."""
    if before is None or now is None or before["fingerprint"] == now["fingerprint"]:
        return
    if before["records"] != now["records"]:
        change = f"the data changed: {before['records']:,} records before, {now['records']:,} now"
    else:
        change = f"the content of the data changed: {now['records']:,} records as before, but not the same"
    raise UsageError(
        f"{folder}: {change}: resume with the data of before, choose another --output, or start from a finished model "
        "with model.checkpoint"
    )


def latest(folder: Path) -> tuple[Path, TrainerState] | None:
    """Return the newest whole checkpoint in a folder of checkpoints; broken ones are passed over with a warning.

    Raises `DataError` if all are broken: starting again would overwrite what may still be repaired.
    """
    broken: DataError | None = None
    for path in sorted(folder.glob(f"{PREFIX}*") if folder.is_dir() else [], key=_step, reverse=True):
        try:
            return path, read_state(path)
        except DataError as error:
            logger.warning("%s: trying the one before it", error)
            broken = error
    if broken is not None:
        raise DataError(f"{broken}, and no other is left: delete {folder} to start again")
    return None


def newest_step(folder: Path) -> int | None:
    """Return the step of the newest checkpoint in a folder by its name, whole or not; None without any."""
    steps = [step for step in map(_step, folder.glob(f"{PREFIX}*")) if step >= 0]
    return max(steps, default=None)


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
    return int(digits) if re.fullmatch("[0-9]{1,18}", digits) else -1  # not ours: sorted before all of ours


def write_finished(folder: Path, finished: Finished) -> None:
    """Record in a stage's folder that it is finished."""
    with replacing(folder / FINISHED_FILE) as file:
        file.write(json.dumps(asdict(finished), indent=2) + "\n")


def read_finished(folder: Path) -> Finished | None:
    """Read the record of a stage's folder; None if it is not finished, or was by a version that kept no record.

    Raises `DataError` for a broken record.
    """
    try:
        content = json.loads((folder / FINISHED_FILE).read_text(encoding="utf-8"))
        counts = {name: content[name] for name in ("steps", "available", "epochs", "stage1_steps")}
        if not all(type(counts[name]) is int or (name == "stage1_steps" and counts[name] is None) for name in counts):
            raise ValueError("expected whole numbers")
        return Finished(**counts, data=_data_facts(content["data"]))
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder / FINISHED_FILE}: broken ({error}): delete it") from None
