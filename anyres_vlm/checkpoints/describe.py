"""Files of a checkpoint folder and what they describe: configuration, parts, geometry, pixel statistics.

Tensors are read from safetensors. If there are none, torch's own files, `pytorch_model*.bin`, are read. They are
pickle: torch's weights-only loader makes tensors of them and refuses any other object.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, CLIPVisionConfig, LlavaNextConfig, LlavaNextImageProcessor
from transformers.utils import cached_file

from anyres_vlm.config import ImagePosition, ModelConfig, TemplateName
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.geometry import Tiling

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


OWN_MODEL_TYPE = "anyres_vlm"
STOCK_MODEL_TYPE = "llava_next"
EXTRAS_FILE = "anyres.json"
BICUBIC = 3


@dataclass(frozen=True)
class Description:
    """A model without its weights. `vision` is a CLIP configuration of transformers, or timm's name and tile side."""

    config: ModelConfig
    vision: CLIPVisionConfig | dict[str, Any]
    text: Any
    image_token_id: int
    mean: list[float]
    std: list[float]
    projector_bias: bool = True
    image_position: ImagePosition = "as_is"  # in the questions of its training

    @property
    def tiling(self) -> Tiling:
        """How the model cuts images."""
        if isinstance(self.vision, dict):
            return self.config.tiling(self.vision["image_size"], self.vision["patch_size"])
        return self.config.tiling(self.vision.image_size, self.vision.patch_size)


def describe(folder: Path, template: TemplateName | None = None) -> Description:
    """Read a folder; `template` replaces its own. Raises `DataError` for what this package cannot express."""
    settings = read_json(folder / "config.json")
    kind = settings.get("model_type")
    if kind not in (STOCK_MODEL_TYPE, OWN_MODEL_TYPE):
        remedy = "`anyres import` reads it" if "mm_projector_type" in settings else "expected llava_next"
        raise DataError(f"{folder / 'config.json'}: model type {kind!r}: {remedy}")
    with parsing(folder / "config.json", "the model that it describes"):
        if (folder / EXTRAS_FILE).exists() or kind == OWN_MODEL_TYPE:
            return _own(folder, settings, template)
        return _stock(folder, settings, template)


def _own(folder: Path, settings: dict[str, Any], template: TemplateName | None) -> Description:
    extras = read_json(folder / EXTRAS_FILE)
    try:
        config = ModelConfig.model_validate(extras["model"])
        mean, std = extras["pixel_mean"], extras["pixel_std"]
        position = TypeAdapter(ImagePosition).validate_python(extras.get("image_position", "as_is"))
    except (KeyError, ValidationError) as error:
        raise DataError(f"{folder / EXTRAS_FILE}: not a model description of this version: {error}") from None
    vision = settings["vision_config"]
    return Description(
        config if template is None else config.model_copy(update={"template": template}),
        vision if config.encoder.kind == "timm" else CLIPVisionConfig.from_dict(vision),
        _text_config(settings["text_config"], settings["tie_word_embeddings"]),
        settings["image_token_index"],
        mean,
        std,
        image_position=position,
    )


def _stock(folder: Path, settings: dict[str, Any], template: TemplateName | None) -> Description:
    where = folder / "config.json"
    try:
        whole: Any = LlavaNextConfig.from_dict(settings)
    except (StrictDataclassError, TypeError, ValueError, KeyError) as error:
        raise DataError(f"{where}: not a LlavaNext configuration: {' '.join(str(error).split())}") from None
    if whole.vision_feature_select_strategy != "default":
        strategy = whole.vision_feature_select_strategy
        raise DataError(f"{where}: vision_feature_select_strategy={strategy!r} keeps CLS, only 'default' is supported")
    if whole.projector_hidden_act != "gelu":
        raise DataError(f"{where}: projector_hidden_act={whole.projector_hidden_act!r}, only 'gelu' is supported")
    if not isinstance(whole.vision_config, CLIPVisionConfig):
        raise DataError(f"{where}: a {whole.vision_config.model_type} encoder, only clip_vision_model is supported")
    processor = _image_processor(folder, whole)
    pinpoints = [tuple(pair) for pair in whole.image_grid_pinpoints]
    try:
        config = ModelConfig.model_validate(
            {
                "llm": whole.text_config._name_or_path or str(folder),
                "encoder": {
                    "name": whole.vision_config._name_or_path or str(folder),
                    "layer": whole.vision_feature_layer,
                },
                "template": template or "chat_template",
                "pinpoints": pinpoints,
            }
        )
    except ValidationError as error:
        fault = error.errors()[0]
        key = {"encoder": "vision_feature_layer", "pinpoints": "image_grid_pinpoints"}[str(fault["loc"][0])]
        raise DataError(f"{where}: {key}={fault['input']!r} is not supported: {fault['msg']}") from None
    return Description(
        config,
        whole.vision_config,
        _text_config(whole.text_config, whole.tie_word_embeddings or whole.text_config.tie_word_embeddings),
        whole.image_token_index,
        list(processor.image_mean),
        list(processor.image_std),
        whole.multimodal_projector_bias,
    )


def _image_processor(folder: Path, whole: Any) -> Any:
    """Its image processor, if it does with images what this package does."""
    files = [folder / "processor_config.json", folder / "preprocessor_config.json"]
    path = next((file for file in files if file.exists()), None)
    if path is None:
        raise DataError(
            f"{folder}: neither processor_config.json nor preprocessor_config.json, so its pixel statistics are "
            "unknown: save its processor beside the model"
        )
    try:
        processor: Any = LlavaNextImageProcessor.from_pretrained(folder)
    except (OSError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not LlavaNext's image processor: {' '.join(str(error).split())}") from None
    side = whole.vision_config.image_size
    size, crop = processor.size, processor.crop_size
    wanted = {
        "do_resize": (processor.do_resize, True),
        "do_rescale": (processor.do_rescale, True),
        "do_normalize": (processor.do_normalize, True),
        "do_convert_rgb": (processor.do_convert_rgb, True),
        "resample": (int(processor.resample), BICUBIC),
        "rescale_factor": (processor.rescale_factor, 1 / 255),
        "size": (size.height or size.shortest_edge, side),
        "crop_size": (crop.height if crop else side, side),
        "image_grid_pinpoints": (_pairs(processor.image_grid_pinpoints), _pairs(whole.image_grid_pinpoints)),
    }
    for name, (got, expected) in wanted.items():
        if got != expected:
            raise DataError(f"{path}: {name} is {got}, expected {expected}: the model would see other tiles than here")
    return processor


def _pairs(pinpoints: Any) -> list[list[int]]:
    return [list(pair) for pair in pinpoints]


def _text_config(config: Any, tied: bool) -> Any:
    """The language model's configuration with the flag that the whole model's decides."""
    if isinstance(config, dict):
        settings = dict(config)
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    config.tie_word_embeddings = tied
    return config
