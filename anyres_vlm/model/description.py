"""What a checkpoint folder describes, read from its JSON files alone: ours by `anyres.json`, else stock LlavaNext's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from pydantic import TypeAdapter, ValidationError
from transformers import AutoConfig, CLIPVisionConfig, LlavaNextConfig, LlavaNextImageProcessor

from anyres_vlm.config import ImagePosition, ModelConfig, TemplateName
from anyres_vlm.errors import DataError
from anyres_vlm.geometry import Tiling
from anyres_vlm.model.files import parsing, read_json

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
