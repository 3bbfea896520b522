"""Models without their weights: configuration, geometry and tokenizer, of base models or of a checkpoint folder.

Tile, patch and tokenizer of most models are read from JSON files, so that commands like `anyres index` start without
torch, which takes seconds to import. timm and the configuration classes of transformers import it; so they are imported
only in the functions that need them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import yaml
from huggingface_hub.errors import StrictDataclassError
from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedTokenizerFast

from anyres_vlm.checkpoints.folders import base_file, checkpoint_folder, parsing, read_json, resolve, unavailable
from anyres_vlm.checkpoints.tokenizer import build_tokenizer, load_tokenizer
from anyres_vlm.config import CheckpointConfig, EncoderConfig, ImagePosition, ModelConfig, TemplateName
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.geometry import Tiling
from anyres_vlm.schema import IMAGE_TOKEN

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig, PreTrainedConfig

OWN_MODEL_TYPE = "anyres_vlm"
STOCK_MODEL_TYPE = "llava_next"
EXTRAS_FILE = "anyres.json"
SIZES_FILE = "architectures.yaml"
BICUBIC = 3


@dataclass(frozen=True)
class Description:
    """A model without its weights.

    `vision` and `text` are configurations of transformers, or the settings to make them from. The `vision` of an
    encoder of timm is a dictionary with timm's name for it, tile and patch.
    """

    config: ModelConfig
    vision: CLIPVisionConfig | dict[str, Any]
    text: PreTrainedConfig | dict[str, Any]
    image_token_id: int
    mean: list[float]
    std: list[float]
    projector_bias: bool = True
    image_position: ImagePosition = "as_is"  # in the questions it was trained on

    @property
    def tiling(self) -> Tiling:
        """How the model cuts images."""
        return self.config.tiling(_setting(self.vision, "image_size"), _setting(self.vision, "patch_size"))

    @property
    def vocab_size(self) -> int:
        """The number of rows of the word embeddings."""
        return _setting(self.text, "vocab_size")

    @cached_property
    def vision_config(self) -> CLIPVisionConfig | None:
        """The configuration of a CLIP encoder; None for an encoder of timm."""
        if self.config.encoder.kind == "timm":
            return None
        return _clip_config(self.vision) if isinstance(self.vision, dict) else self.vision

    @cached_property
    def text_config(self) -> Any:
        """The configuration of the language model."""
        return _text_config(self.text) if isinstance(self.text, dict) else self.text


def describe_model(config: ModelConfig | CheckpointConfig) -> tuple[ModelConfig, Tiling, PreTrainedTokenizerFast]:
    """Return what the data of a model depends on: its configuration, its tiling and its tokenizer.

    They equal those of `build_model`. Raises `DataError` for a model that is broken or not available.
    """
    if isinstance(config, ModelConfig):
        return config, config.tiling(*encoder_geometry(config.encoder)), load_tokenizer(config.llm)
    folder, described = _describe_checkpoint(config)
    return described.config, described.tiling, read_tokenizer(folder, described)


def describe_bases(config: ModelConfig | CheckpointConfig) -> Description:
    """Return the architecture of a model, from the configurations of its base models or of its checkpoint.

    No tokenizer is read, so base models have no `image_token_id`. Raises `DataError` for a model whose configuration is
    neither known nor available.
    """
    if isinstance(config, CheckpointConfig):
        return _describe_checkpoint(config)[1]
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD  # imports torch

    vision: Any = _timm_settings(config.encoder) if config.encoder.kind == "timm" else _base_config(config.encoder.name)
    text: Any = _base_config(config.llm)
    return Description(
        config,
        getattr(vision, "vision_config", vision),
        getattr(text, "text_config", text),
        0,
        OPENAI_CLIP_MEAN,
        OPENAI_CLIP_STD,
    )


def describe(folder: Path, template: TemplateName | None = None) -> Description:
    """Read a checkpoint folder; `template` replaces its own. Raises `DataError` for a model that is not supported."""
    settings = read_json(folder / "config.json")
    kind = settings.get("model_type")
    if kind not in (STOCK_MODEL_TYPE, OWN_MODEL_TYPE):
        remedy = "`anyres import` reads it" if "mm_projector_type" in settings else "expected llava_next"
        raise DataError(f"{folder / 'config.json'}: model type {kind!r}: {remedy}")
    with parsing(folder / "config.json", "the model that it describes"):
        if (folder / EXTRAS_FILE).exists() or kind == OWN_MODEL_TYPE:
            return _describe_own(folder, settings, template)
        return _describe_stock(folder, settings, template)


def encoder_geometry(config: EncoderConfig) -> tuple[int, int]:
    """Return the encoder's tile and patch side in pixels, from its configuration alone."""
    name = resolve(config.name)
    try:
        if config.kind == "timm":
            settings = _timm_settings(config)
            return settings["image_size"], settings["patch_size"]
        if (path := base_file(name, "config.json")) is not None:
            settings = read_json(Path(path))
            if settings.get("model_type") == "clip":
                settings = settings.get("vision_config") or {}
            if settings.get("model_type") == "clip_vision_model" and _has(settings, "image_size", "patch_size"):
                return settings["image_size"], settings["patch_size"]
        from transformers import CLIPVisionConfig  # imports torch; knows the defaults of other configurations

        vision: Any = CLIPVisionConfig.from_pretrained(name)
    except (OSError, RuntimeError) as error:
        raise unavailable("encoder", config.name, error) from error
    return int(vision.image_size), int(vision.patch_size)


def timm_network(config: EncoderConfig, pretrained: bool) -> Any:
    """Return a network of timm, with or without its weights. Raises `UsageError` or `DataError` if there is none."""
    import timm  # imports torch

    name = resolve(config.name)
    options = {} if config.tile is None else {"img_size": config.tile}
    source = f"local-dir:{name}" if Path(name).is_dir() else name
    try:
        return timm.create_model(source, pretrained=pretrained, num_classes=0, **options)
    except TypeError:  # it takes no img_size
        raise UsageError(f"encoder {config.name}: its tile cannot be set, so it is no vision transformer") from None
    except ValueError as error:  # a hub id without its prefix
        raise unavailable("encoder", config.name, error) from error


@cache
def known_sizes() -> dict[str, dict[str, Any]]:
    """Return the sizes of published base models by hub id; `parameters` are in billions, as published."""
    text = (resources.files("anyres_vlm") / "assets" / SIZES_FILE).read_text(encoding="utf-8")
    entries: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return {name: entries[entry.get("same_as", name)] for name, entry in entries.items()}


def read_tokenizer(folder: Path, described: Description) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a checkpoint folder, with the chat template of its processor.

    Raises `DataError` if it does not fit the model, or if it has no chat template and the model names none of ours.
    """
    tokenizer = build_tokenizer(folder, "")
    if (found := tokenizer.get_vocab().get(IMAGE_TOKEN)) != described.image_token_id:
        raise DataError(
            f"{folder}: {IMAGE_TOKEN} is token {found} of its tokenizer, config.json says {described.image_token_id}"
        )
    if len(tokenizer) > described.vocab_size:
        raise DataError(
            f"{folder}: its tokenizer has {len(tokenizer)} tokens, its language model {described.vocab_size}"
        )
    if described.config.template != "chat_template":
        return tokenizer
    if (template := _processor_template(folder)) is not None:
        tokenizer.chat_template = template
    if tokenizer.chat_template is None:
        names = ", ".join(get_args(TemplateName))
        raise DataError(
            f"{folder}: it has no chat template: name the one it was trained with (--template or model.template), one "
            f"of {names}"
        )
    return tokenizer


def _processor_template(folder: Path) -> str | None:
    """Return the chat template of a folder's processor, looked up in the order that transformers' processors use.

    None means the tokenizer's own, which includes `chat_template.jinja`.
    """
    for path in (folder / "processor_config.json", folder / "chat_template.json"):  # of older releases
        found = read_json(path).get("chat_template") if path.exists() else None
        if isinstance(found, dict):
            found = found.get("default")
        if found is not None and not isinstance(found, str):
            raise DataError(f"{path}: chat_template: expected the text of a Jinja template, got {type(found).__name__}")
        if found is not None:
            return found
    return None


def _describe_checkpoint(config: CheckpointConfig) -> tuple[Path, Description]:
    """Return the folder of a run's checkpoint, and its description with the run's own settings applied."""
    folder = checkpoint_folder(config.checkpoint)
    described = describe(folder, config.template)
    return folder, replace(described, config=config.apply(described.config))


def _describe_own(folder: Path, settings: dict[str, Any], template: TemplateName | None) -> Description:
    """Describe a folder that this package saved."""
    extras = read_json(folder / EXTRAS_FILE)
    try:
        config = ModelConfig.model_validate(extras["model"])
        mean, std = extras["pixel_mean"], extras["pixel_std"]
        position = TypeAdapter(ImagePosition).validate_python(extras.get("image_position", "as_is"))
    except (KeyError, ValidationError) as error:
        raise DataError(f"{folder / EXTRAS_FILE}: not a model description of this version: {error}") from None
    vision = settings["vision_config"]
    text = settings["text_config"] | {"tie_word_embeddings": settings["tie_word_embeddings"]}
    # A size that is not stated is a default, which only the configuration class knows.
    if not _has(vision, "image_size", "patch_size"):
        if config.encoder.kind == "timm":
            raise DataError(f"{folder / 'config.json'}: vision_config: no image_size and patch_size in pixels")
        vision = _clip_config(vision)
    return Description(
        config if template is None else config.model_copy(update={"template": template}),
        vision,
        text if _has(text, "vocab_size") else _text_config(text),
        settings["image_token_index"],
        mean,
        std,
        image_position=position,
    )


def _describe_stock(folder: Path, settings: dict[str, Any], template: TemplateName | None) -> Description:
    """Describe a LlavaNext folder of another origin."""
    from transformers import CLIPVisionConfig, LlavaNextConfig  # imports torch

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
    try:
        config = ModelConfig.model_validate(
            {
                "llm": whole.text_config._name_or_path or str(folder),
                "encoder": {
                    "name": whole.vision_config._name_or_path or str(folder),
                    "layer": whole.vision_feature_layer,
                },
                "template": template or "chat_template",
                "pinpoints": [tuple(pair) for pair in whole.image_grid_pinpoints],
            }
        )
    except ValidationError as error:
        fault = error.errors()[0]
        key = {"encoder": "vision_feature_layer", "pinpoints": "image_grid_pinpoints"}[str(fault["loc"][0])]
        raise DataError(f"{where}: {key}={fault['input']!r} is not supported: {fault['msg']}") from None
    whole.text_config.tie_word_embeddings = whole.tie_word_embeddings or whole.text_config.tie_word_embeddings
    return Description(
        config,
        whole.vision_config,
        whole.text_config,
        whole.image_token_index,
        list(processor.image_mean),
        list(processor.image_std),
        whole.multimodal_projector_bias,
    )


def _image_processor(folder: Path, whole: Any) -> Any:
    """Return a folder's image processor. Raises `DataError` if it cuts or scales images differently from here."""
    from transformers import LlavaNextImageProcessor  # imports torch

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


def _timm_settings(config: EncoderConfig) -> dict[str, Any]:
    """Return timm's name for an encoder, and its tile and patch side, which only the network itself knows."""
    import torch

    from anyres_vlm.model.encoder import plain_geometry  # imports torch and timm

    with torch.device("meta"):
        network = timm_network(config, pretrained=False)
    tile, patch = plain_geometry(network)
    return {"architecture": network.pretrained_cfg["architecture"], "image_size": tile, "patch_size": patch}


def _base_config(name: str) -> PreTrainedConfig:
    """Return the configuration of a base model: a published one as it is known here, any other from its folder."""
    from transformers import AutoConfig  # imports torch

    if name in known_sizes():
        return _for_model(known_sizes()[name]["config"])
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(resolve(name), trust_remote_code=False)
        return config
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"no configuration of {name!r} is available ({reason}): give a folder with its config.json, or one of "
            f"{', '.join(known_sizes())}"
        ) from None


def _text_config(settings: Mapping[str, Any]) -> Any:
    config: Any = _for_model(settings)
    config.tie_word_embeddings = settings["tie_word_embeddings"]  # some classes drop it
    return config


def _for_model(settings: Mapping[str, Any]) -> PreTrainedConfig:
    from transformers import AutoConfig  # imports torch

    options = dict(settings)
    config: PreTrainedConfig = AutoConfig.for_model(options.pop("model_type"), **options)
    return config


def _clip_config(settings: dict[str, Any]) -> CLIPVisionConfig:
    from transformers import CLIPVisionConfig  # imports torch

    return CLIPVisionConfig.from_dict(settings)


def _has(settings: Mapping[str, Any], *names: str) -> bool:
    """Whether these settings are stated as whole numbers."""
    return all(type(settings.get(name)) is int for name in names)


def _setting(part: Any, name: str) -> int:
    return int(part[name] if isinstance(part, dict) else getattr(part, name))
