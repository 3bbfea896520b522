"""Checkpoint folders: stock `LlavaNextForConditionalGeneration` wherever stock transformers can express the model.

Beside transformers' files lies `anyres.json` with what they have no room for: template, dialect, layout, projector.
What stock cannot express is saved the same way under this project's own model type.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, cast

import timm
import torch
from huggingface_hub import load_torch_model, save_torch_state_dict
from pydantic import ValidationError
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlavaNextConfig,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.initialization import no_init_weights

from anyres_vlm.config import ModelConfig
from anyres_vlm.errors import DataError
from anyres_vlm.model.encoder import ClipEncoder, Encoder, TimmEncoder
from anyres_vlm.model.vlm import VisionLanguageModel

OWN_MODEL_TYPE = "anyres_vlm"
EXTRAS_FILE = "anyres.json"


def stock_obstacle(model: VisionLanguageModel) -> str | None:
    """Why stock LlavaNext cannot express this model; None if it can."""
    if model.config.projector != "mlp2x_gelu":
        return f"stock LlavaNext has no {model.config.projector} projector"
    if not isinstance(model.vision_tower, ClipEncoder):
        return "stock LlavaNext has no timm encoder"
    if model.tiling.layout != "spatial_unpad":
        return f"stock LlavaNext has no {model.tiling.layout} layout"
    if not model.tiling.pinpoints:
        return "stock LlavaNext always cuts a grid, this model sees the thumbnail alone"
    return None


def save_pretrained(
    model: VisionLanguageModel,
    weights: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerFast,
    chat_template: str,
    folder: Path,
) -> None:
    """Write config, weights (safetensors, shards of at most 5 GB), tokenizer and processor into an existing folder."""
    settings = _config(model)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    extras = {"model": model.config.model_dump(mode="json"), "pixel_mean": _flat(model.vision_tower.mean)}
    extras["pixel_std"] = _flat(model.vision_tower.std)
    (folder / EXTRAS_FILE).write_text(json.dumps(extras, indent=2) + "\n", encoding="utf-8")
    tied = ["language_model.lm_head.weight"] if settings["tie_word_embeddings"] else None
    save_torch_state_dict(
        {name: tensor.contiguous() for name, tensor in weights.items()},
        folder,
        max_shard_size="5GB",
        shared_tensors_to_discard=tied,
    )
    model.language_model.generation_config.save_pretrained(folder)
    tokenizer.chat_template = chat_template
    if stock_obstacle(model) is None:
        _processor(model, tokenizer, chat_template).save_pretrained(folder)
    else:
        tokenizer.save_pretrained(folder)


def load_pretrained(folder: Path) -> tuple[VisionLanguageModel, PreTrainedTokenizerFast]:
    """A model and tokenizer that `save_pretrained` wrote. Raises `DataError` naming what is missing or broken."""
    settings, extras = _read(folder / "config.json"), _read(folder / EXTRAS_FILE)
    try:
        config = ModelConfig.model_validate(extras["model"])
    except (KeyError, ValidationError) as error:
        raise DataError(f"{folder / EXTRAS_FILE}: not a model description of this version: {error}") from None
    with no_init_weights():
        model = VisionLanguageModel(
            config,
            _empty_encoder(config, settings["vision_config"], extras),
            _empty_llm(settings["text_config"]),
            settings["image_token_index"],
        )
    try:
        outcome = load_torch_model(model, folder, strict=False, safe=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{folder}: its weights cannot be read ({error}); use a complete checkpoint folder") from None
    tied = {"language_model.lm_head.weight"} if settings["tie_word_embeddings"] else set()
    missing, unexpected = set(outcome.missing_keys) - tied, set(outcome.unexpected_keys)
    if missing or unexpected:
        raise DataError(f"{folder}: weights missing {sorted(missing)[:3]} or unexpected {sorted(unexpected)[:3]}")
    model.language_model.tie_weights()
    if (folder / "generation_config.json").exists():
        model.language_model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, cast(PreTrainedTokenizerFast, AutoTokenizer.from_pretrained(folder))


def load_parts(model: VisionLanguageModel, folder: Path, parts: tuple[str, ...]) -> None:
    """Copy the weights of some parts of the model, such as `multi_modal_projector`, out of a checkpoint folder."""
    wanted = {name: tensor for name, tensor in model.state_dict().items() if name.split(".")[0] in parts}
    found: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as weights:
            found |= {name: weights.get_tensor(name) for name in weights.keys() if name in wanted}  # noqa: SIM118
    if model.language_model.config.tie_word_embeddings:
        wanted.pop("language_model.lm_head.weight", None)
    for name, tensor in wanted.items():
        if name not in found or found[name].shape != tensor.shape:
            got = "nothing" if name not in found else f"shape {tuple(found[name].shape)}"
            raise DataError(
                f"{folder}: expected {name} of shape {tuple(tensor.shape)}, got {got}; use the same base models"
            )
    model.load_state_dict(found, strict=False)


def _config(model: VisionLanguageModel) -> dict[str, Any]:
    # Copies: a composite config takes its parts over and resets their attention.
    text_config: Any = copy.deepcopy(model.language_model.config)
    tower, layer = model.vision_tower, model.config.encoder.layer
    vision_config = copy.deepcopy(tower.vision_model.config) if isinstance(tower, ClipEncoder) else None
    settings: dict[str, Any] = LlavaNextConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=model.image_token_id,
        vision_feature_layer=layer if isinstance(layer, int) else list(layer),
        image_grid_pinpoints=[[canvas.height, canvas.width] for canvas in model.tiling.canvases],
        image_seq_length=model.tiling.patches,
        tie_word_embeddings=text_config.tie_word_embeddings,
        architectures=["LlavaNextForConditionalGeneration"],
        dtype=str(model.image_newline.dtype).removeprefix("torch."),
    ).to_dict()
    if stock_obstacle(model) is not None:
        settings |= {"model_type": OWN_MODEL_TYPE, "architectures": [type(model).__name__]}
    if isinstance(tower, TimmEncoder):
        architecture = tower.vision_model.pretrained_cfg["architecture"]
        settings["vision_config"] = {
            "model_type": "timm",
            "architecture": architecture,
            "image_size": tower.tile,
        }
    return settings


def _processor(
    model: VisionLanguageModel, tokenizer: PreTrainedTokenizerFast, chat_template: str
) -> LlavaNextProcessor:
    tower = model.vision_tower
    images = LlavaNextImageProcessor(
        size={"shortest_edge": tower.tile},
        crop_size={"height": tower.tile, "width": tower.tile},
        image_grid_pinpoints=[[canvas.height, canvas.width] for canvas in model.tiling.canvases],
        image_mean=_flat(tower.mean),
        image_std=_flat(tower.std),
    )
    return LlavaNextProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=tower.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLS, which the strategy takes off again
        chat_template=chat_template,
    )


def _empty_encoder(config: ModelConfig, vision_config: dict[str, Any], extras: dict[str, Any]) -> Encoder:
    pixels = extras["pixel_mean"], extras["pixel_std"]
    if config.encoder.kind == "clip":
        return ClipEncoder(CLIPVisionModel(CLIPVisionConfig.from_dict(vision_config)), config.encoder.layer, *pixels)
    architecture, tile = vision_config["architecture"], vision_config["image_size"]
    network = timm.create_model(architecture, pretrained=False, num_classes=0, img_size=tile)
    return TimmEncoder(network, config.encoder.layer, *pixels)


def _empty_llm(text_config: dict[str, Any]) -> PreTrainedModel:
    settings = dict(text_config)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    return cast(PreTrainedModel, AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; expected a checkpoint folder written by `anyres train`") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _flat(statistics: Tensor) -> list[float]:
    return [round(value, 8) for value in statistics.flatten().tolist()]
