"""Replacements for a rehearsal: base models shrunk to a few layers, and a selection of the user's records.

A replica keeps the real configuration and tokenizer files. Only depth and widths of the configuration change;
vocabulary, tile, patch and every other key stay. Weights are random.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import timm
import torch
from huggingface_hub import list_repo_files, save_torch_state_dict, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedConfig,
)

from anyres_vlm.checkpoints import weights
from anyres_vlm.checkpoints.describe import describe, timm_network
from anyres_vlm.checkpoints.folders import HUB_ID, PICKLED, parsing, read_json, resolve
from anyres_vlm.checkpoints.load_save import empty_model
from anyres_vlm.config import CheckpointConfig, EncoderConfig, ModelConfig
from anyres_vlm.data.blobs import read_blob
from anyres_vlm.data.index.rows import IndexSettings, index_rows
from anyres_vlm.data.index.table import OK
from anyres_vlm.data.sources import Source
from anyres_vlm.errors import DataError
from anyres_vlm.schema import ImageRef

SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
HUB_ERRORS = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError)
WEIGHT_INDEX = ".index.json"  # names the shards of the real weights
LAYERS, HEAD_DIM, HEADS = 2, 8, 4  # small, since a CPU without bf16 units is slow at the output head
DEVIATION = 0.1  # of random weights: large enough that every position affects the logits

INDEXED = 20_000  # maximum number of records of a source that are indexed
INDEXING_S = 20.0  # time limit for that
CHUNK = 256  # records indexed at once
CHOSEN = 256  # maximum number of records of a stage
PER_GROUP = 4  # longest records, records with most images, records without images, records of each source
PER_REJECT = 2  # records of each kind of reject


def small_files(name: str) -> Path:
    """Return the folder of a base model or checkpoint with all of its files but the weights, downloaded if missing.

    Raises `DataError` for a name that is neither a folder nor available on the hub.
    """
    folder = Path(resolve(name))
    if folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(name):
        raise DataError(f"{name}: no such folder, and not a hub id: name a folder, a hub id or an embedded: model")
    try:
        return Path(snapshot_download(name, allow_patterns=list(SMALL_FILES)))
    except HUB_ERRORS as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"{name}: no such folder, and the download from the hub failed: {reason}") from None


def weight_files(name: str) -> list[str]:
    """Return the names of a model's weight files, in its folder or on the hub.

    Raises `DataError` if there are none or if a shard of a local folder is missing.
    """
    folder = Path(resolve(name))
    if not folder.is_dir():
        with suppress(*HUB_ERRORS):  # offline, a run would read the cache
            patterns = ("*.safetensors", PICKLED)
            if found := [file for file in list_repo_files(name) if any(fnmatch(file, one) for one in patterns)]:
                return sorted(found)
        folder = small_files(name)
    paths = weights.weight_files(folder)
    if missing := [path.name for path in paths if not path.exists()]:
        raise DataError(f"{name}: {missing[0]} is missing: download the complete model again")
    return [path.name for path in paths]


def replicate(model: ModelConfig | CheckpointConfig, folder: Path, seed: int) -> ModelConfig | CheckpointConfig:
    """Write replicas of a model's parts into a folder and return the configuration that names them.

    Raises `DataError` for parts that are unavailable or of a kind that transformers does not know.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if isinstance(model, CheckpointConfig):
            target = _copy_small_files(small_files(model.checkpoint), folder / "checkpoint")
            _replicate_checkpoint(target)
            return model.model_copy(update={"checkpoint": str(target)})
        llm = _copy_small_files(small_files(model.llm), folder / "llm")
        _replicate_llm(llm, weight_files(model.llm))
        encoder = folder / "encoder"
        if model.encoder.kind == "timm":
            _replicate_timm(model.encoder, encoder)
        else:
            _copy_small_files(small_files(model.encoder.name), encoder)
            _replicate_clip(encoder, _depth(model.encoder.layer), weight_files(model.encoder.name))
    named = model.encoder.model_copy(update={"name": str(encoder)})
    return model.model_copy(update={"llm": str(llm), "encoder": named})


def shrink(settings: dict[str, Any], layers: int) -> dict[str, Any]:
    """Return the configuration keys that make a language model or encoder small, with their values.

    The ratio of heads to key-value heads is kept. Raises `DataError` for a kind that transformers does not know.
    """
    kind = settings.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise DataError(
            f"model_type {kind!r} is unknown to this release of transformers: install a release that supports it"
        )
    config: Any = CONFIG_MAPPING[kind].from_dict(dict(settings))
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    ratio = max(heads // kv_heads, 1)
    small_kv_heads = min(kv_heads, max(HEADS // ratio, 1))
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    scaling = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    has_factors = any(isinstance(value, list) for value in scaling.values())  # one per frequency
    small_dim = dim if has_factors else HEAD_DIM
    width = small_kv_heads * ratio * small_dim
    sizes = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": small_kv_heads * ratio,
        "num_key_value_heads": small_kv_heads,
        "head_dim": small_dim,
        "initializer_range": DEVIATION,
    }
    names = type(config).attribute_map
    small = {names.get(key, key): value for key, value in sizes.items() if getattr(config, key, None) is not None}
    per_layer = {
        key: value[:layers]
        for key, value in settings.items()
        if isinstance(value, list) and len(value) == config.num_hidden_layers
    }
    return small | per_layer


def _copy_small_files(source: Path, target: Path) -> Path:
    """Copy the small files of a folder into a new one and return it."""
    target.mkdir(parents=True)
    for pattern in SMALL_FILES:
        for file in source.glob(pattern):
            if not file.name.endswith(WEIGHT_INDEX):
                shutil.copyfile(file, target / file.name)
    return target


def _replicate_llm(folder: Path, real_weights: list[str]) -> None:
    settings = read_json(folder / "config.json")
    text = settings.get("text_config", settings)
    text |= shrink(text, LAYERS)
    _write_config(folder, settings)
    with parsing(folder / "config.json", "the language model that it describes"):
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        _save(model.to(_dtype(config)), folder, real_weights)


def _replicate_clip(folder: Path, layers: int, real_weights: list[str]) -> None:
    settings = read_json(folder / "config.json")
    vision = settings.get("vision_config", settings)
    vision |= {"model_type": "clip_vision_model"} if "model_type" not in vision else {}
    vision |= shrink(vision, layers)
    _write_config(folder, settings)
    with parsing(folder / "config.json", "the encoder that it describes"):
        config: Any = CLIPVisionConfig.from_pretrained(folder)
        _save(CLIPVisionModel(config).to(_dtype(config)), folder, real_weights)


def _replicate_timm(encoder: EncoderConfig, folder: Path) -> None:
    """Write a folder that timm can read, of the same architecture with a smaller depth and width."""
    with torch.device("meta"):
        real = timm_network(encoder, pretrained=False)
    facts = real.pretrained_cfg
    args = {"depth": _depth(encoder.layer), "embed_dim": HEADS * HEAD_DIM, "num_heads": HEADS}
    network = timm.create_model(facts["architecture"], pretrained=False, num_classes=0, **args)
    folder.mkdir(parents=True)
    kept = {key: facts[key] for key in ("mean", "std", "input_size", "interpolation", "crop_pct", "first_conv")}
    entry = {"architecture": facts["architecture"], "num_classes": 0, "model_args": args, "pretrained_cfg": kept}
    _write_config(folder, entry)
    save_torch_state_dict({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, folder)


def _replicate_checkpoint(folder: Path) -> None:
    settings = read_json(folder / "config.json")
    settings["text_config"] |= shrink(settings["text_config"], LAYERS)
    if settings.get("vision_config", {}).get("model_type") != "timm":
        layer = settings.get("vision_feature_layer", -2)
        settings["vision_config"] |= shrink(settings["vision_config"], _depth(layer))
    _write_config(folder, settings)
    with parsing(folder / "config.json", "the model that it describes"):
        described = describe(folder, "plain" if not (folder / "anyres.json").exists() else None)
        model = empty_model(described)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or name == "image_newline":
            nn.init.normal_(parameter, std=DEVIATION)
        else:
            nn.init.constant_(parameter, float(name.endswith("weight")))
    save_torch_state_dict(model.state_dict(), folder, shared_tensors_to_discard=_tied(model.language_model))


def _depth(layer: int | tuple[int, ...] | list[int]) -> int:
    """Return the number of layers that is needed for the chosen hidden states."""
    layers = [layer] if isinstance(layer, int) else layer
    return max(LAYERS, *(abs(number) for number in layers))


def _dtype(config: PreTrainedConfig) -> torch.dtype:
    named: Any = config.dtype
    found = getattr(torch, named) if isinstance(named, str) else named
    return found if isinstance(found, torch.dtype) else torch.float32


def _write_config(folder: Path, settings: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _save(model: Any, folder: Path, real_weights: list[str]) -> None:
    """Save only the weights, in the real ones' format; `save_pretrained` would rewrite the configuration, too."""
    if any(name.endswith(".safetensors") for name in real_weights):
        save_torch_state_dict(model.state_dict(), folder, shared_tensors_to_discard=_tied(model))
    else:
        torch.save(model.state_dict(), folder / "pytorch_model.bin")


def _tied(model: Any) -> list[str] | None:
    """Return the name of the output head if it is tied to the embedding."""
    return ["lm_head.weight"] if getattr(model.config, "tie_word_embeddings", False) else None


def index_part(source: Source, settings: IndexSettings) -> pa.Table:
    """Index a whole source, or as many chunks of a large one, in random order, as the limits allow."""
    count = len(source)
    starts = list(range(0, count, CHUNK))
    random.Random(0).shuffle(starts)  # so that a part of the source covers all of it
    deadline = time.monotonic() + INDEXING_S
    tables: list[pa.Table] = []
    for number, start in enumerate(starts):
        if number * CHUNK >= INDEXED or (tables and time.monotonic() > deadline):
            break
        tables.append(index_rows(source, settings, start, min(start + CHUNK, count)))
    return pa.concat_tables(tables)


def choose(table: pa.Table, tokens: int, seed: int) -> list[int]:
    """Choose rows of a source for a rehearsal: extremes, each subsource, each kind of reject, and random ones.

    Random rows are added up to about `tokens` tokens in all. Malformed records cannot be copied and are left out.
    """
    row, length = table["row"].to_numpy(), table["tokens"].to_numpy()
    status, origin = np.array(table["status"].to_pylist()), np.array(table["source"].to_pylist())
    images = np.array([len(sides) for sides in table["heights"].to_pylist()])
    good = np.flatnonzero(status == OK)
    by_length = good[np.argsort(-length[good], kind="stable")]
    groups = [
        by_length[:PER_GROUP],
        good[np.argsort(-images[good], kind="stable")][:PER_GROUP],
        good[images[good] == 0][:PER_GROUP],
    ]
    groups += [good[origin[good] == name][:PER_GROUP] for name in np.unique(origin[good])]
    groups += [
        np.flatnonzero(status == kind)[:PER_REJECT]
        for kind in np.unique(status)
        if kind not in (OK, "malformed_record", "no_answer", "image_count")
    ]
    chosen = list(dict.fromkeys(position for group in groups for position in group.tolist()))
    total = int(length[[position for position in chosen if status[position] == OK]].sum())
    rest = np.random.default_rng(seed).permutation(np.setdiff1d(good, chosen)).tolist()
    for position in rest:
        if len(chosen) >= CHOSEN or total + length[position] > tokens:
            break
        chosen.append(position)
        total += int(length[position])
    return sorted(int(row[position]) for position in chosen)


def write_records(source: Source, rows: list[int], folder: Path) -> Path:
    """Write rows of any source as JSON lines, with their images in the folder `images`, and return the file."""
    (folder / "images").mkdir(parents=True)
    path = folder / "records.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            try:
                record = source.record(row)
            except DataError:  # a reject without content, or a file that has changed since
                continue
            targets = (folder / "images" / f"{row}-{number}" for number in range(len(record.images)))
            names = [_write_image(image, target) for image, target in zip(record.images, targets, strict=True)]
            messages = [{"role": turn.role, "content": turn.text} for turn in record.turns]
            entry = {"id": record.id, "images": names, "system": record.system, "messages": messages}
            file.write(json.dumps(entry) + "\n")
    return path


def _write_image(image: ImageRef, path: Path) -> str:
    """Link or write an image, and return its name in the folder; a missing file stays missing."""
    path = path.with_suffix(Path(image.name).suffix)
    if image.path is not None and image.offset == 0 and image.length is None:
        path.symlink_to(image.path.absolute())
    else:
        path.write_bytes(read_blob(image))
    return path.name
