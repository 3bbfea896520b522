"""Files of a checkpoint folder: locate the folder, read its JSON, and its tensors one by one.

Tensors are read from safetensors. If there are none, torch's own files, `pytorch_model*.bin`, are read. They are pickle:
torch's weights-only loader makes tensors of them and refuses any other object.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import cached_file

from anyres_vlm.errors import DataError, UsageError

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # not ./folder
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
PICKLED = "pytorch_model*.bin"  # not training_args.bin and the like
SHARD = re.compile(r"[^/\\\0]+\.(safetensors|bin)")
WHOLE_FILES = ("model.safetensors", "pytorch_model.bin")
# What reading published models raises: files that are missing or cut off, of other shapes, of other formats.
BROKEN = (OSError, ValueError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError)


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


def load_fault(error: Exception) -> str:
    """Why a library could not load a model, in one line."""
    text = str(error).strip()
    if isinstance(error, pickle.UnpicklingError):  # torch's own words advise to load it nevertheless
        if "Unsupported" in text and "Unsupported operand" not in text:
            return "its weights hold other Python objects than tensors, which are never loaded: use safetensors"
        return "its weights are cut off, or a file of another kind: fetch them again"
    return text.splitlines()[0] if text else type(error).__name__


def base_file(name: Path | str, file: str) -> str | None:
    """The path of a small file of a folder or hub id; None where it is not there or cannot be fetched."""
    if Path(name).is_dir():
        path = Path(name) / file
        return str(path) if path.is_file() else None
    try:
        found: str | None = cached_file(str(name), file, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):
        return None
    return found


def weight_bytes(folder: Path) -> int:
    """Return the total size of the weight files. Raises `DataError` for a missing shard."""
    with parsing(folder, "its weights"):
        return sum(path.stat().st_size for path in weight_files(folder))


def read_tensors(folder: Path, names: Container[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors of a folder, or those with the given names, from the shards in its index if it has one.

    Raises `DataError` for a shard that is missing or broken, or holds anything but tensors.
    """
    for path in weight_files(folder):
        try:
            if path.suffix == ".bin":
                for name, tensor in read_pickled(path).items():
                    if names is None or name in names:
                        yield name, tensor
                continue
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if names is None or name in names:
                        yield name, file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path}: its weights cannot be read ({error}); use a complete checkpoint folder") from None


def read_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of one of torch's own files, mapped from disk. Raises `DataError` for anything else in it."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; use a complete checkpoint folder")
    if not zipfile.is_zipfile(path):  # from before torch 1.6, whose reader takes the file's word for what to allocate
        raise DataError(
            f"{path}: not a file of torch.save, or one from before torch 1.6: only pickle of tensors in a zip archive "
            "is read; use a complete checkpoint folder, with safetensors if there are any"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a broken pickle raises whatever its instructions run into
        reason = load_fault(error)
        raise DataError(f"{path}: pickle can run any code, only tensors are read from it ({reason})") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected tensors by name, got {type(content).__name__}")
    for name, tensor in content.items():
        is_plain = isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not isinstance(name, str) or not is_plain or tensor.nbytes > path.stat().st_size:
            raise DataError(f"{path}: {str(name)[:80]!r} is not a plain tensor with a name")
    return content


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder's weights: safetensors, or where there are none torch's own. Raises `DataError`."""
    for whole in WHOLE_FILES:
        index = folder / f"{whole}.index.json"
        if index.exists():
            return _indexed(index, Path(whole).suffix)
        if (folder / whole).exists():  # an adapter may lie beside it
            return [folder / whole]
        pattern = PICKLED if whole.endswith(".bin") else "*.safetensors"
        if shards := sorted(folder.glob(pattern)):
            return shards
    raise DataError(f"{folder}: no *.safetensors and no {PICKLED} in it; use a complete checkpoint folder")


def _indexed(index: Path, suffix: str) -> list[Path]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict):
        raise DataError(f"{index}: no weight_map in it; use a complete checkpoint folder")
    for name in places.values():
        if not isinstance(name, str) or not SHARD.fullmatch(name) or not name.endswith(suffix):
            raise DataError(f"{index}: {name!r}: expected a *{suffix} file of this folder")
    return [index.parent / name for name in sorted(set(places.values()))]
