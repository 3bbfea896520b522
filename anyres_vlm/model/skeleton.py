"""Build a model from configurations only, without loading weights, on any device."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from importlib import resources
from typing import Any

import torch
import yaml
from transformers import AutoConfig, CLIPVisionConfig, PreTrainedConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from anyres_vlm.config import CheckpointConfig, EncoderConfig, ModelConfig
from anyres_vlm.errors import DataError
from anyres_vlm.model.description import Description, describe
from anyres_vlm.model.encoder import plain_geometry
from anyres_vlm.model.files import checkpoint_folder
from anyres_vlm.model.hub import resolve, timm_network
from anyres_vlm.model.pretrained import empty_model
from anyres_vlm.model.vlm import VisionLanguageModel

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
