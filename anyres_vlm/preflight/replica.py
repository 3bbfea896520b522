"""Stand-ins for a rehearsal: base models shrunk to two layers, and some of the user's records.

A replica has the real configuration and tokenizer files. Of a configuration only depth and widths change; vocabulary,
tile, patch and every other key stay. Weights are random.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import timm
import torch
from huggingface_hub import list_repo_files, save_torch_state_dict, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from numpy.typing import NDArray
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedConfig,
)

from anyres_vlm.checkpoints.describe import describe, timm_network
from anyres_vlm.checkpoints.folders import HUB_ID, parsing, read_json, resolve
from anyres_vlm.checkpoints.load_save import empty_model
from anyres_vlm.config import CheckpointConfig, EncoderConfig, ModelConfig
from anyres_vlm.data.blobs import read_blob
from anyres_vlm.data.index.rows import IndexSettings, index_rows
from anyres_vlm.data.index.table import OK
from anyres_vlm.data.sources import Source
from anyres_vlm.errors import DataError
from anyres_vlm.schema import ImageRef

SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
WEIGHT_FILES = (".safetensors", ".bin")
WEIGHT_INDEX = ".index.json"  # names the shards of the real weights
LAYERS, HEAD_DIM, HEADS = 2, 8, 4  # a CPU without bf16 units multiplies a vocabulary by the width for each label
DEVIATION = 0.1  # of random weights: large enough that every position counts in the logits

LOOKED_AT = 20_000  # records of a source that are indexed at most
LOOK_S = 20.0  # and seconds
CHUNK = 256  # records indexed at once
CHOSEN = 256  # records of a stage at most
EACH = 4  # of the longest, of those with most images, without images, of each source
EACH_REJECT = 2  # of each kind of reject


def small_files(name: str) -> Path:
    """The folder of a base model or checkpoint with all of its files but the weights, downloaded where it is absent.

    Raises `DataError` for a name that is neither a folder nor to be had from the hub.
    """
    folder = Path(resolve(name))
    if folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(name):
        raise DataError(f"{name}: no such folder, and not a hub id: name a folder, a hub id or an embedded: model")
    try:
        return Path(snapshot_download(name, allow_patterns=list(SMALL_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"{name}: no such folder, and its files cannot be had from the hub: {reason}") from None


def weight_files(name: str) -> list[str]:
    """The names of a model's files of weights, in its folder or on the hub.

    Raises `DataError` where there are none, and for a shard that the index of the shards names and that is missing.
    """
    folder = Path(resolve(name))
    try:
        there = [path.name for path in folder.iterdir()] if folder.is_dir() else list_repo_files(name)
    except (HfHubHTTPError, HFValidationError, OSError):  # offline: what is in the cache is what a run would read
        there = [path.name for path in small_files(name).iterdir()]
    weights = sorted(file for file in there if file.endswith(WEIGHT_FILES))
    if not weights:
        raise DataError(f"{name}: no weights in it (*.safetensors or *.bin): fetch the whole model")
    for index in small_files(name).glob(f"*{WEIGHT_INDEX}"):
        named = set(read_json(index).get("weight_map", {}).values())
        used = any(file in named for file in weights)
        if used and (missing := sorted(named - set(weights))):
            raise DataError(f"{name}: {index.name} names {missing[0]}, which is missing: fetch the whole model")
    return weights


def replicate(model: ModelConfig | CheckpointConfig, folder: Path, seed: int) -> ModelConfig | CheckpointConfig:
    """Make replicas of a model's parts in a folder. Returns the configuration that names them.

    Raises `DataError` for parts that are not at hand or of a kind that transformers does not know.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if isinstance(model, CheckpointConfig):
            target = _copied(small_files(model.checkpoint), folder / "checkpoint")
            _replicate_checkpoint(target)
            return model.model_copy(update={"checkpoint": str(target)})
        llm = _copied(small_files(model.llm), folder / "llm")
        _replicate_llm(llm, weight_files(model.llm))
        encoder = folder / "encoder"
        if model.encoder.kind == "timm":
            _replicate_timm(model.encoder, encoder)
        else:
            _copied(small_files(model.encoder.name), encoder)
            _replicate_clip(encoder, _depth(model.encoder.layer), weight_files(model.encoder.name))
    named = model.encoder.model_copy(update={"name": str(encoder)})
    return model.model_copy(update={"llm": str(llm), "encoder": named})


def shrink(settings: dict[str, Any], layers: int) -> dict[str, Any]:
    """The keys of a language model's or encoder's configuration that make it small.

    The ratio of heads to key-value heads stays. Raises `DataError` for a kind that transformers does not know.
    """
    kind = settings.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise DataError(f"model_type {kind!r} is not known to this release of transformers: install one that has it")
    config: Any = CONFIG_MAPPING[kind].from_dict(dict(settings))
    heads = config.num_attention_heads
    pairs = getattr(config, "num_key_value_heads", None) or heads
    ratio = max(heads // pairs, 1)
    small_pairs = min(pairs, max(HEADS // ratio, 1))
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    scaling = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    small_dim = dim if any(isinstance(value, list) for value in scaling.values()) else HEAD_DIM  # a factor a frequency
    width = small_pairs * ratio * small_dim
    sizes = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": small_pairs * ratio,
        "num_key_value_heads": small_pairs,
        "head_dim": small_dim,
        "initializer_range": DEVIATION,
    }
    names = type(config).attribute_map
    small = {names.get(key, key): value for key, value in sizes.items() if getattr(config, key, None) is not None}
    a_layer_each = {
        key: value[:layers]
        for key, value in settings.items()
        if isinstance(value, list) and len(value) == config.num_hidden_layers
    }
    return small | a_layer_each


def _copied(source: Path, target: Path) -> Path:
    """A folder with the small files of another."""
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
    """A folder as timm reads it, of the same architecture with a smaller depth and width."""
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
    """So many layers that the chosen hidden states exist."""
    layers = [layer] if isinstance(layer, int) else layer
    return max(LAYERS, *(abs(number) for number in layers))


def _dtype(config: PreTrainedConfig) -> torch.dtype:
    named: Any = config.dtype
    found = getattr(torch, named) if isinstance(named, str) else named
    return found if isinstance(found, torch.dtype) else torch.float32


def _write_config(folder: Path, settings: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _save(model: Any, folder: Path, real_weights: list[str]) -> None:
    """The weights alone, of the real ones' format: transformers' own method would also rewrite the configuration."""
    if any(name.endswith(".safetensors") for name in real_weights):
        save_torch_state_dict(model.state_dict(), folder, shared_tensors_to_discard=_tied(model))
    else:
        torch.save(model.state_dict(), folder / "pytorch_model.bin")


def _tied(model: Any) -> list[str] | None:
    """The head that a language model shares with its embedding."""
    return ["lm_head.weight"] if getattr(model.config, "tie_word_embeddings", False) else None


def look(source: Source, settings: IndexSettings) -> pa.Table:
    """Index records from the first to the last, all of a small source; of a large one what the limits allow."""
    count = len(source)
    starts = list(range(0, count, CHUNK))
    random.Random(0).shuffle(starts)  # so that a source cut short by the limits is seen from end to end
    deadline = time.monotonic() + LOOK_S
    tables: list[pa.Table] = []
    for number, start in enumerate(starts):
        if number * CHUNK >= LOOKED_AT or (tables and time.monotonic() > deadline):
            break
        tables.append(index_rows(source, settings, start, min(start + CHUNK, count)))
    return pa.concat_tables(tables)


def choose(table: pa.Table, tokens: int, seed: int) -> list[int]:
    """Rows of the source for a rehearsal: the extremes, each source, each kind of reject, and random ones.

    Random ones are added up to about so many tokens in all. Malformed records, which cannot be copied, stay out.
    """
    row, length, status, origin, images = _columns(table)
    good = np.flatnonzero(status == OK)
    by_length = good[np.argsort(-length[good], kind="stable")]
    strata = [by_length[:EACH], good[np.argsort(-images[good], kind="stable")][:EACH], good[images[good] == 0][:EACH]]
    strata += [good[origin[good] == name][:EACH] for name in np.unique(origin[good])]
    strata += [
        np.flatnonzero(status == kind)[:EACH_REJECT]
        for kind in np.unique(status)
        if kind not in (OK, "malformed_record", "no_answer", "image_count")
    ]
    chosen = list(dict.fromkeys(position for stratum in strata for position in stratum.tolist()))
    total = int(length[[position for position in chosen if status[position] == OK]].sum())
    rest = np.random.default_rng(seed).permutation(np.setdiff1d(good, chosen)).tolist()
    for position in rest:
        if len(chosen) >= CHOSEN or total + length[position] > tokens:
            break
        chosen.append(position)
        total += int(length[position])
    return sorted(int(row[position]) for position in chosen)


def _columns(table: pa.Table) -> tuple[NDArray[Any], ...]:
    """Row, length in tokens, status, source and number of images of each record."""
    images = np.array([len(sides) for sides in table["heights"].to_pylist()])
    rows, tokens = table["row"].to_numpy(), table["tokens"].to_numpy()
    return rows, tokens, np.array(table["status"].to_pylist()), np.array(table["source"].to_pylist()), images


def write_records(source: Source, rows: list[int], folder: Path) -> Path:
    """Write rows of any source as JSON lines with their images beside them. Returns the file."""
    (folder / "images").mkdir(parents=True)
    path = folder / "records.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for entry in _entries(source, rows, folder / "images"):
            file.write(json.dumps(entry) + "\n")
    return path


def _entries(source: Source, rows: list[int], folder: Path) -> Iterator[dict[str, Any]]:
    for row in rows:
        try:
            record = source.record(row)
        except DataError:  # it was readable a moment ago, or is a reject that has no content
            continue
        names = [_place(image, folder / f"{row}-{number}") for number, image in enumerate(record.images)]
        messages = [{"role": turn.role, "content": turn.text} for turn in record.turns]
        yield {"id": record.id, "images": names, "system": record.system, "messages": messages}


def _place(image: ImageRef, path: Path) -> str:
    """Link or write an image; a missing file stays missing. Returns its name in the folder."""
    path = path.with_suffix(Path(image.name).suffix)
    if image.path is not None and image.offset == 0 and image.length is None:
        path.symlink_to(image.path.absolute())
    else:
        path.write_bytes(read_blob(image))
    return path.name
