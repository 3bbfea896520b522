"""Folders of base models and checkpoints: where they are, their JSON files, and what to report if they are broken."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers.utils import cached_file

from anyres_vlm.errors import DataError, UsageError

EMBEDDED = "embedded:"
TRAINER = "trainer"  # subfolder of a running stage's checkpoint, with all that resumption reads
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # does not match ./folder
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
PICKLED = "pytorch_model*.bin"  # other pickles, such as training_args.bin, are never read


def resolve(name: str) -> str:
    """Return the folder of an `embedded:` base model; any other name is returned as it is, with `~` expanded."""
    if not name.startswith(EMBEDDED):
        return str(Path(name).expanduser()) if name.startswith("~") else name
    folder = Path(str(resources.files("anyres_vlm") / "assets" / name.removeprefix(EMBEDDED)))
    if not folder.is_dir():
        raise UsageError(f"{name}: no such embedded model; there are {sorted(p.name for p in folder.parent.iterdir())}")
    return str(folder)


def checkpoint_folder(name: str | Path) -> Path:
    """Return a local folder as given, or the snapshot of a hub id, downloaded if needed. Raises `DataError`."""
    folder = Path(name).expanduser()
    if folder.is_dir() or not HUB_ID.fullmatch(str(name)):
        return folder
    try:
        folder = Path(snapshot_download(str(name), allow_patterns=HUB_FILES))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(str(name), allow_patterns=[PICKLED])
        return folder
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"checkpoint {name}: no such folder, and the download from the hub failed: {reason}") from None


def base_file(name: Path | str, file: str) -> str | None:
    """Return the path of a small file of a folder or hub id; None if it does not exist or cannot be downloaded."""
    if Path(name).is_dir():
        path = Path(name) / file
        return str(path) if path.is_file() else None
    try:
        found: str | None = cached_file(str(name), file, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):
        return None
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises `DataError` for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(_missing(path)) from None
    except (OSError, ValueError, RecursionError) as error:  # also nested too deeply, or numbers with too many digits
        raise DataError(f"{path}: not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _missing(path: Path) -> str:
    """Return what to do about a missing JSON file."""
    if not (path.parent / TRAINER).is_dir():
        return f"{path}: no such file; expected a checkpoint folder"
    digits = path.parent.name.rpartition("-")[2]
    steps = f"--max-steps {int(digits)}" if digits.isdecimal() else "--max-steps STEPS"
    return (
        f"{path.parent}: holds only what resumes its run, not a model: use the stage's model folder, which is written "
        f"when the stage is finished; rerun its anyres train with {steps} to end the stage here"
    )


@contextmanager
def parsing(where: Path, what: str) -> Iterator[None]:
    """Convert any exception that a library raises while it reads an untrusted file to a `DataError`."""
    try:
        yield
    except (DataError, UsageError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:500]
        raise DataError(f"{where}: {what} cannot be used ({type(error).__name__}: {reason})") from error


def unavailable(what: str, name: str, error: Exception) -> DataError:
    """Return the error for a base model that cannot be loaded; `what` is its part, such as `encoder`."""
    if isinstance(error, DataError):
        return error
    reason = load_fault(error)
    return DataError(f"{what} {name!r} cannot be loaded: {reason}; give a hub id, a local folder or an embedded: name")


def load_fault(error: Exception) -> str:
    """Return why a library could not load a model, in one line."""
    text = str(error).strip()
    if isinstance(error, pickle.UnpicklingError):  # torch's own message advises loading the file regardless
        if "Unsupported" in text and "Unsupported operand" not in text:
            return "its weights hold other Python objects than tensors, which are never loaded: use safetensors"
        return "its weights are cut off, or a file of another kind: fetch them again"
    return text.splitlines()[0] if text else type(error).__name__
