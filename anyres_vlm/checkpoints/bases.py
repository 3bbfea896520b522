"""Base models by hub id, local folder or `embedded:` name, put together to a vision-language model."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, cast

import timm
import torch
import yaml
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from anyres_vlm.checkpoints.describe import (
    BROKEN,
    Description,
    base_file,
    checkpoint_folder,
    describe,
    load_fault,
    read_json,
)
from anyres_vlm.checkpoints.load_save import (
    clean_generation_config,
    clean_padding,
    empty_model,
    load_pretrained,
    read_tokenizer,
)
from anyres_vlm.checkpoints.tokenizer import build_tokenizer
from anyres_vlm.config import CheckpointConfig, EncoderConfig, ModelConfig
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.geometry import Tiling
from anyres_vlm.model.encoder import ClipEncoder, Encoder, TimmEncoder, plain_geometry
from anyres_vlm.model.vlm import VisionLanguageModel
from anyres_vlm.schema import IMAGE_TOKEN

EMBEDDED = "embedded:"


def resolve(name: str) -> str:
    """The folder of an `embedded:` base model; any other name as it is, `~` expanded."""
    if not name.startswith(EMBEDDED):
        return str(Path(name).expanduser()) if name.startswith("~") else name
    folder = Path(str(resources.files("anyres_vlm") / "assets" / name.removeprefix(EMBEDDED)))
    if not folder.is_dir():
        raise UsageError(f"{name}: no such embedded model; there are {sorted(p.name for p in folder.parent.iterdir())}")
    return str(folder)


def build_model(
    config: ModelConfig | CheckpointConfig, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[VisionLanguageModel, PreTrainedTokenizerFast]:
    """Base models, a projector and newline initialised from `seed`, and the tokenizer with `<image>` in it.

    A checkpoint comes whole, and nothing is initialised. All weights are of `dtype`, buffers of what they are made for.
    """
    if isinstance(config, CheckpointConfig):
        model, tokenizer = load_pretrained(config.checkpoint, config.template, dtype)
        model.configure(config.apply(model.config))
        return model, tokenizer
    tokenizer = load_tokenizer(config.llm)
    language_model = _load_llm(config.llm, dtype)
    _fit_vocabulary(language_model, tokenizer)
    encoder = load_encoder(config.encoder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = VisionLanguageModel(config, encoder, language_model, image_token_id(tokenizer))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model, tokenizer


def describe_model(
    config: ModelConfig | CheckpointConfig,
) -> tuple[ModelConfig, Tiling, PreTrainedTokenizerFast]:
    """What `build_model` would give, its weights left unread."""
    if isinstance(config, ModelConfig):
        return config, config.tiling(*encoder_geometry(config.encoder)), load_tokenizer(config.llm)
    folder = checkpoint_folder(config.checkpoint)
    described = describe(folder, config.template)
    described = replace(described, config=config.apply(described.config))
    return described.config, described.tiling, read_tokenizer(folder, described)


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A fast tokenizer with the special token `<image>` and a padding token: nothing here is padded, others do."""
    tokenizer = build_tokenizer(resolve(name), "llm")
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def image_token_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The id that stands for one visual token."""
    return cast(int, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))


def load_encoder(config: EncoderConfig) -> Encoder:
    """The vision encoder in fp32 with its own normalisation statistics."""
    name = resolve(config.name)
    try:
        if config.kind == "timm":
            network = timm_network(config, pretrained=True)
            pixels = network.pretrained_cfg
            return TimmEncoder(network, config.layer, pixels["mean"], pixels["std"])
        vision_model, report = CLIPVisionModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        mean, std = _clip_statistics(name)
    except BROKEN as error:
        raise _unavailable("encoder", config.name, error) from error
    _require_all_weights("encoder", config.name, report)
    return ClipEncoder(vision_model, config.layer, mean, std)


def encoder_geometry(config: EncoderConfig) -> tuple[int, int]:
    """Tile and patch side in pixels, from the encoder's description alone: no weight is read."""
    name = resolve(config.name)
    try:
        if config.kind == "timm":
            with torch.device("meta"):
                return plain_geometry(timm_network(config, pretrained=False))
        vision: Any = CLIPVisionConfig.from_pretrained(name)
    except (OSError, RuntimeError) as error:
        raise _unavailable("encoder", config.name, error) from error
    return int(vision.image_size), int(vision.patch_size)


def timm_network(config: EncoderConfig, pretrained: bool) -> Any:
    """A network of timm, with its weights or without. Raises `UsageError` or `DataError` if there is none to be had."""
    name = resolve(config.name)
    options = {} if config.tile is None else {"img_size": config.tile}
    source = f"local-dir:{name}" if Path(name).is_dir() else name
    try:
        return timm.create_model(source, pretrained=pretrained, num_classes=0, **options)
    except TypeError:  # it takes no img_size
        raise UsageError(f"encoder {config.name}: its tile cannot be set, so it is no vision transformer") from None
    except ValueError as error:  # a hub id without its prefix
        raise _unavailable("encoder", config.name, error) from error


def _clip_statistics(name: str) -> tuple[list[float], list[float]]:
    """Mean and deviation of the encoder's image processor; CLIP's own where the checkpoint carries none."""
    try:
        processor: Any = CLIPImageProcessor.from_pretrained(name)
    except OSError:
        return list(OPENAI_CLIP_MEAN), list(OPENAI_CLIP_STD)
    return list(processor.image_mean), list(processor.image_std)


def _load_llm(name: str, dtype: torch.dtype) -> PreTrainedModel:
    place, options = resolve(name), {"trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(place, **options)
        clean_padding(config, f"llm {name}")
        if (path := base_file(place, "generation_config.json")) is not None:
            options["generation_config"] = clean_generation_config(read_json(Path(path)), f"llm {name}")
        llm, report = AutoModelForCausalLM.from_pretrained(
            place, config=config, dtype=dtype, output_loading_info=True, **options
        )
    except BROKEN as error:
        raise _unavailable("llm", name, error) from error
    _require_all_weights("llm", name, report)
    if "generation_config" not in options:  # what config.json says of generation
        llm.generation_config = clean_generation_config(llm.generation_config.to_diff_dict(), f"llm {name}")
    return cast(PreTrainedModel, llm)


def _require_all_weights(what: str, name: str, report: dict[str, Any]) -> None:
    """Raise `DataError` for a base with weights missing, which transformers would fill with random numbers."""
    if missing := sorted(report["missing_keys"]):
        names = ", ".join(missing[:3])
        raise DataError(f"{what} {name!r}: {len(missing)} weights missing ({names}): use a complete folder")


def _fit_vocabulary(language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Give added tokens rows of their own; a vocabulary padded beyond the tokenizer stays as it is.

    A new row is the mean of all others: the same in every process, and never the likeliest next token.
    """
    rows = language_model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) <= rows:
        return
    language_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for layer in (language_model.get_input_embeddings(), language_model.get_output_embeddings()):
        for parameter in layer.parameters():  # a head may have a bias
            parameter.data[rows:] = parameter.data[:rows].mean(0, dtype=torch.float32).to(parameter.dtype)


def _unavailable(what: str, name: str, error: Exception) -> DataError:
    if isinstance(error, DataError):
        return error
    reason = load_fault(error)
    return DataError(f"{what} {name!r} cannot be loaded: {reason}; give a hub id, a local folder or an embedded: name")


SIZES_FILE = "architectures.yaml"


def skeleton(config: ModelConfig | CheckpointConfig, layers: int | None = None) -> VisionLanguageModel:
    """Return the model with uninitialised weights on torch's default device, with all or the first `layers` layers.

    `layers` applies to the language model. The vocabulary is the language model's own, so there is no extra row for an
    `<image>` token that the tokenizer lacks. Raises `DataError` for a model whose configuration is neither known nor
    available.
    """
    described = describe_bases(config)
    if layers is not None:
        described = replace(described, text=_shortened(described.text, layers))
    return empty_model(described)


def describe_bases(config: ModelConfig | CheckpointConfig) -> Description:
    """Return the description of a model from the configurations of its parts."""
    if isinstance(config, CheckpointConfig):
        described = describe(checkpoint_folder(config.checkpoint), config.template)
        return replace(described, config=config.apply(described.config))
    vision: CLIPVisionConfig | dict[str, Any]
    if config.encoder.kind == "timm":
        vision = _timm_description(config.encoder)
    else:
        vision = _read(config.encoder.name)
        vision = getattr(vision, "vision_config", vision)
    text = _read(config.llm)
    return Description(config, vision, getattr(text, "text_config", text), 0, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)


@cache
def known_sizes() -> dict[str, dict[str, Any]]:
    """Return the sizes of published base models by hub id; `parameters` are in billions, as published."""
    text = (resources.files("anyres_vlm") / "assets" / SIZES_FILE).read_text(encoding="utf-8")
    entries: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return {name: entries[entry.get("same_as", name)] for name, entry in entries.items()}


def _read(name: str) -> PreTrainedConfig:
    if name in known_sizes():
        settings = dict(known_sizes()[name]["config"])
        return AutoConfig.for_model(settings.pop("model_type"), **settings)
    try:
        return AutoConfig.from_pretrained(resolve(name), trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"no configuration of {name!r} is available ({reason}): give a folder with its config.json, or one of "
            f"{', '.join(known_sizes())}"
        ) from None


def _timm_description(config: EncoderConfig) -> dict[str, Any]:
    with torch.device("meta"):
        network = timm_network(config, pretrained=False)
    tile, patch = plain_geometry(network)
    return {"architecture": network.pretrained_cfg["architecture"], "image_size": tile, "patch_size": patch}


def _shortened(text: Any, layers: int) -> Any:
    """Return the configuration with this many layers, `layer_types` truncated accordingly."""
    settings = text.to_dict() | {"num_hidden_layers": layers}
    if settings.get("layer_types"):
        settings["layer_types"] = settings["layer_types"][:layers]
    return type(text).from_dict(settings)
