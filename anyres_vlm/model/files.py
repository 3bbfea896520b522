"""Files of a checkpoint folder: locate the folder, read its JSON and its tensors one by one. Pickle is never read."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from anyres_vlm.errors import DataError, UsageError

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # not ./folder
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
SHARD = re.compile(r"[^/\\\0]+\.safetensors")
WHOLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def checkpoint_folder(name: str | Path) -> Path:
    """Return a local folder as given, or the snapshot of a hub id, downloaded if needed. Raises `DataError`."""
    folder = Path(name).expanduser()
    if folder.is_dir() or not HUB_ID.fullmatch(str(name)):
        return folder
    try:
        return Path(snapshot_download(str(name), allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"checkpoint {name}: no such folder, and the download from the hub failed: {reason}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises `DataError` for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; expected a checkpoint folder") from None
    except (OSError, ValueError, RecursionError) as error:  # also too deep nesting, too long numbers
        raise DataError(f"{path}: not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


@contextmanager
def parsing(where: Path, what: str) -> Iterator[None]:
    """Turn any exception that a library raises for an untrusted file into a `DataError`."""
    try:
        yield
    except (DataError, UsageError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:500]
        raise DataError(f"{where}: {what} cannot be used ({type(error).__name__}: {reason})") from error


def weight_bytes(folder: Path) -> int:
    """Return the total size of the weight files. Raises `DataError` for a missing shard."""
    with parsing(folder, "its weights"):
        return sum(path.stat().st_size for path in _shards(folder))


def read_tensors(folder: Path, names: Container[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors of a folder, or those with the given names, from the shards in its index if it has one.

    Raises `DataError` for a shard that is missing or broken, and if the folder has only pickle files.
    """
    for path in _shards(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if names is None or name in names:
                        yield name, file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path}: its weights cannot be read ({error}); use a complete checkpoint folder") from None


def _shards(folder: Path) -> list[Path]:
    if (folder / INDEX_FILE).exists():
        places = read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(places, dict):
            raise DataError(f"{folder / INDEX_FILE}: it has no weight_map; use a complete checkpoint folder")
        if invalid := [name for name in places.values() if not isinstance(name, str) or not SHARD.fullmatch(name)]:
            raise DataError(f"{folder / INDEX_FILE}: {invalid[0]!r}: expected a *.safetensors file of this folder")
        return [folder / name for name in sorted(set(places.values()))]
    if (folder / WHOLE_FILE).exists():  # there may be an adapter, too
        return [folder / WHOLE_FILE]
    if shards := sorted(folder.glob("*.safetensors")):
        return shards
    if pickled := sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]):
        raise DataError(
            f"{pickled[0]}: pickle can run any code, so only safetensors are read: if you trust the file, load it "
            "and save it with safetensors.torch.save_file"
        )
    raise DataError(f"{folder}: it has no *.safetensors file; use a complete checkpoint folder")
