"""Stock `LlavaNextForConditionalGeneration`: which models it can express, its configuration and its processor."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaNextConfig, LlavaNextImageProcessor, LlavaNextProcessor, PreTrainedTokenizerFast

from anyres_vlm.checkpoints.describe import OWN_MODEL_TYPE
from anyres_vlm.geometry import Size, Tiling, count_tokens
from anyres_vlm.model.encoder import ClipEncoder, TimmEncoder
from anyres_vlm.model.vlm import VisionLanguageModel

TRIED_STEP, TRIED_LIMIT = 8, 2048  # sides in pixels of the images for which two dialects are compared


def stock_obstacle(model: VisionLanguageModel) -> str | None:
    """Return why stock LlavaNext cannot express this model; None if it can."""
    if model.config.projector != "mlp2x_gelu":
        return f"stock LlavaNext has no {model.config.projector} projector"
    if not isinstance(model.vision_tower, ClipEncoder):
        return "stock LlavaNext has no timm encoder"
    if model.tiling.layout != "spatial_unpad":
        return f"stock LlavaNext has no {model.tiling.layout} layout"
    if not model.tiling.pinpoints:
        return "stock LlavaNext always cuts a grid, this model sees only the thumbnail"
    return None


def stock_config(model: VisionLanguageModel, dtype: torch.dtype) -> dict[str, Any]:
    """Return the content of `config.json` for weights of a dtype; `model_type` is our own if stock cannot load it."""
    # Copies, because LlavaNextConfig modifies the configurations that it is given: it resets their attention.
    text_config: Any = copy.deepcopy(model.language_model.config)
    text_config.dtype = dtype
    tower, layer = model.vision_tower, model.config.encoder.layer
    vision_config = copy.deepcopy(tower.vision_model.config) if isinstance(tower, ClipEncoder) else None
    if vision_config is not None:
        vision_config.dtype = dtype
    settings: dict[str, Any] = LlavaNextConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=model.image_token_id,
        vision_feature_layer=layer if isinstance(layer, int) else list(layer),
        image_grid_pinpoints=[[canvas.height, canvas.width] for canvas in model.tiling.canvases],
        image_seq_length=model.tiling.patches,
        tie_word_embeddings=text_config.tie_word_embeddings,
        architectures=["LlavaNextForConditionalGeneration"],
        dtype=str(dtype).removeprefix("torch."),
    ).to_dict()
    if stock_obstacle(model) is not None:
        settings |= {"model_type": OWN_MODEL_TYPE, "architectures": [type(model).__name__]}
    if isinstance(tower, TimmEncoder):
        architecture = tower.vision_model.pretrained_cfg["architecture"]
        # Arguments that differ from the architecture's defaults; timm before 1.0.23 does not record them.
        changes = getattr(tower.vision_model, "_model_args", {})
        settings["vision_config"] = {
            "model_type": "timm",
            "architecture": architecture,
            "image_size": tower.tile,
            "patch_size": tower.patch,
            "model_args": {key: value for key, value in changes.items() if key not in ("img_size", "num_classes")},
        }
    return settings


def stock_processor(
    model: VisionLanguageModel, tokenizer: PreTrainedTokenizerFast, chat_template: str
) -> LlavaNextProcessor:
    """Return a stock processor that cuts the same tiles and counts the same tokens."""
    tower = model.vision_tower
    images = LlavaNextImageProcessor(
        size={"shortest_edge": tower.tile},
        crop_size={"height": tower.tile, "width": tower.tile},
        image_grid_pinpoints=[[canvas.height, canvas.width] for canvas in model.tiling.canvases],
        image_mean=pixel_statistics(tower.mean),
        image_std=pixel_statistics(tower.std),
    )
    return LlavaNextProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=tower.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLS, which the strategy removes again
        chat_template=chat_template,
    )


def count_changes(tiling: Tiling) -> str | None:
    """Describe the images for which stock keeps a different number of tokens than the dialect; None if there are none.

    Stock gets the canvases as the dialect reads them, in the same order, so it cuts the same tiles. But it rounds the
    rows and columns to keep differently, which is tried for many sizes.
    """
    if tiling.dialect == "hf":
        return None
    canvases = tuple((canvas.height, canvas.width) for canvas in tiling.canvases)
    stock = Tiling(canvases, tiling.tile, tiling.patch, tiling.layout, "hf")
    sides = range(TRIED_STEP, TRIED_LIMIT + 1, TRIED_STEP)
    sizes = [Size(height=height, width=width) for height in sides for width in sides]
    other = [size for size in sizes if count_tokens(size, tiling) != count_tokens(size, stock)]
    if not other:
        return None
    worst = max(other, key=lambda size: abs(count_tokens(size, tiling) - count_tokens(size, stock)))
    return (
        f"dialect {tiling.dialect}: stock transformers cuts the same tiles, but keeps other tokens for {len(other):,} "
        f"of {len(sizes):,} sizes up to {TRIED_LIMIT} pixels, such as {worst.width}x{worst.height} (width x height): "
        f"{count_tokens(worst, stock):,} instead of {count_tokens(worst, tiling):,}"
    )


def pixel_statistics(statistics: Tensor) -> list[float]:
    """Return a mean or deviation of pixels as a list with one number per channel."""
    return [round(value, 8) for value in statistics.flatten().tolist()]
