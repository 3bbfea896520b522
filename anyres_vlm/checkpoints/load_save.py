"""Load and save checkpoints, as stock `LlavaNextForConditionalGeneration` wherever stock transformers can express them.

In addition to transformers' files there is `anyres.json` for what they cannot hold: template, dialect, layout and
projector. A model that stock cannot express is saved in the same way under this project's own model type.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import timm
import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionModel,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.initialization import no_init_weights

from anyres_vlm.checkpoints.describe import EXTRAS_FILE, Description, describe, read_tokenizer
from anyres_vlm.checkpoints.folders import checkpoint_folder, parsing, read_json
from anyres_vlm.checkpoints.stock import pixel_statistics, stock_config, stock_obstacle, stock_processor
from anyres_vlm.checkpoints.weights import (
    HEAD,
    Renamings,
    cast_parameters,
    load_weights,
    parameters_on_meta,
    read_tensors,
    renamed,
    require_weights,
)
from anyres_vlm.config import TemplateName
from anyres_vlm.model.encoder import ClipEncoder, Encoder, TimmEncoder
from anyres_vlm.model.vlm import VisionLanguageModel

logger = logging.getLogger(__name__)

STOCK_NAMES: Renamings = (
    # Released files and ours have `vision_tower.vision_model.` and `language_model.model.`. Files of transformers 5
    # lack the former; the names that its models have in memory start with `model.` and lack the latter.
    (r"(?:model\.)?vision_tower\.(?:vision_model\.)?", "vision_tower.vision_model."),
    (r"(?:model\.)?(multi_modal_projector\.|image_newline$)", r"\1"),
    (r"model\.language_model\.", "language_model.model."),
    (r"lm_head\.", "language_model.lm_head."),
)
# Generation settings that decide whether others are valid, so they are tried first.
MODES = ("do_sample", "num_beams", "return_dict_in_generate", "use_cache")
IGNORED = ("transformers_version", "_from_model_config", "_commit_hash", "_original_object_hash")


def load_pretrained(
    name: Path | str,
    template: TemplateName | None = None,
    dtype: torch.dtype | None = torch.float32,
    *,
    llm_dtype: torch.dtype | None = None,
    read: bool = True,
) -> tuple[VisionLanguageModel, PreTrainedTokenizerFast]:
    """Load a model and its tokenizer from a folder or hub id, saved by `save_pretrained` or a stock LlavaNext model.

    `template` replaces the folder's own; with `dtype=None` each weight keeps the dtype of its file. `llm_dtype`, if
    given, is that of the language model. Unless weights are `read`, parameters stay on the meta device. Raises
    `DataError` that names what is missing, broken or not supported.
    """
    folder = checkpoint_folder(name)
    described = describe(folder, template)
    tokenizer = read_tokenizer(folder, described)
    with parsing(folder / "config.json", "the model that it describes"):
        vision = [] if described.vision_config is None else [described.vision_config]
        require_weights([described.text_config, *vision], lambda: empty_model(described), folder)
        with parameters_on_meta():
            model = empty_model(described)
    if read:
        load_weights(model, _stock_tensors(folder, described), folder, dtype, llm_dtype)
    else:
        model.language_model.tie_weights()
        cast_parameters(model, dtype, llm_dtype)
    settings = model.language_model.generation_config.to_diff_dict()
    if (folder / "generation_config.json").exists():
        settings = read_json(folder / "generation_config.json")
    generation = model.language_model.generation_config = clean_generation_config(settings, str(folder))
    if generation.eos_token_id is None:
        generation.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer


def save_pretrained(
    model: VisionLanguageModel,
    weights: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerFast,
    chat_template: str,
    folder: Path,
) -> None:
    """Write config, weights (safetensors, shards of at most 5 GB), tokenizer and processor into an existing folder."""
    settings = stock_config(model, weights["image_newline"].dtype)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    extras = {
        "model": model.config.model_dump(mode="json"),
        "pixel_mean": pixel_statistics(model.vision_tower.mean),
        "pixel_std": pixel_statistics(model.vision_tower.std),
        "image_position": model.image_position,
    }
    (folder / EXTRAS_FILE).write_text(json.dumps(extras, indent=2) + "\n", encoding="utf-8")
    save_torch_state_dict(
        {name: tensor.contiguous() for name, tensor in weights.items()},
        folder,
        max_shard_size="5GB",
        shared_tensors_to_discard=[HEAD] if settings["tie_word_embeddings"] else None,
    )
    model.language_model.generation_config.save_pretrained(folder)
    tokenizer.chat_template = chat_template
    if stock_obstacle(model) is None:
        stock_processor(model, tokenizer, chat_template).save_pretrained(folder)
    else:
        tokenizer.save_pretrained(folder)


def empty_model(described: Description) -> VisionLanguageModel:
    """Return a model with uninitialised weights on torch's default device."""
    with no_init_weights():
        model = VisionLanguageModel(
            described.config, _empty_encoder(described), _empty_llm(described), described.image_token_id
        )
    model.image_position = described.image_position
    return model


def _empty_encoder(described: Description) -> Encoder:
    layer, clip = described.config.encoder.layer, described.vision_config
    if clip is not None:
        return ClipEncoder(CLIPVisionModel(clip), layer, described.mean, described.std)
    vision = cast(dict[str, Any], described.vision)
    options = {**vision.get("model_args", {}), "img_size": vision["image_size"]}
    network = timm.create_model(vision["architecture"], pretrained=False, num_classes=0, **options)
    return TimmEncoder(network, layer, described.mean, described.std)


def _empty_llm(described: Description) -> PreTrainedModel:
    return cast(PreTrainedModel, AutoModelForCausalLM.from_config(described.text_config, dtype=torch.float32))


def _stock_tensors(folder: Path, described: Description) -> Iterator[tuple[str, Tensor]]:
    """Yield the folder's weights under this package's names, with zero biases for a projector that has none."""
    for name, tensor in read_tensors(folder):
        name = renamed(name, STOCK_NAMES)
        yield name, tensor
        if not described.projector_bias and name.startswith("multi_modal_projector."):
            yield name.replace(".weight", ".bias"), tensor.new_zeros(tensor.shape[0])


def clean_generation_config(settings: Mapping[str, Any], where: str) -> GenerationConfig:
    """Return a config of all settings that can be saved together; log the others and why they are dropped.

    Each setting is tried with transformers' own strict validation, so the rules are those of the installed release.
    """
    kept: dict[str, Any] = {}
    dropped: list[str] = []
    for name in sorted(settings.keys() - set(IGNORED), key=lambda name: (name not in MODES, name)):
        if settings[name] is None:
            continue
        if (reason := _refusal(kept | {name: settings[name]}, name)) is None:
            kept[name] = settings[name]
        else:
            dropped.append(f"{name}={settings[name]!r} ({reason})")
    if dropped:
        logger.info(
            "%s: generation settings dropped, a model that has them could not be saved: %s", where, ", ".join(dropped)
        )
    return GenerationConfig(**kept)


def _refusal(settings: Mapping[str, Any], name: str) -> str | None:
    """Return in a few words why the setting `name` cannot be saved together with the others; None if it can."""
    if name.endswith("_token_id"):
        ids = settings[name] if isinstance(settings[name], list) else [settings[name]]
        if not ids or not all(type(number) is int and number >= 0 for number in ids):
            return "not a token id"
    if callable(getattr(GenerationConfig, name, None)):
        return "not a setting"
    config = GenerationConfig()
    for key, value in settings.items():
        setattr(config, key, value)
    try:
        config.validate(strict=True)
        config.to_json_string()
    except Exception as error:  # values of any JSON type reach comparisons of numbers
        return _short(str(error))
    return None


def _short(message: str) -> str:
    """Return the rule that a message states, without the advice around it."""
    text = " ".join(message.split())
    if "only used in sample-based" in text:
        return "only used with do_sample"
    if "only used in beam-based" in text:
        return "only used with num_beams above 1"
    return text.removeprefix("GenerationConfig is invalid: ")[:160]


def clean_padding(config: PreTrainedConfig, where: str) -> None:
    """Drop a padding id outside the vocabulary, such as -1: the embedding would use another row for padding."""
    settings: Any = config.get_text_config()
    pad, rows = getattr(settings, "pad_token_id", None), getattr(settings, "vocab_size", None)
    if isinstance(pad, int) and isinstance(rows, int) and not 0 <= pad < rows:
        settings.pad_token_id = None
        logger.info("%s: pad_token_id=%d dropped, the vocabulary has %d rows", where, pad, rows)


def end_tokens(config: GenerationConfig) -> set[int]:
    """Return the end tokens of a config, which holds none, one or a list."""
    ending: Any = config.eos_token_id
    return set() if ending is None else {ending} if isinstance(ending, int) else set(ending)
