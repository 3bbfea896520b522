"""Base models by hub id, local folder or `embedded:` name, combined into a vision-language model."""

from __future__ import annotations

import pickle
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from anyres_vlm.checkpoints.describe import describe_bases, timm_network
from anyres_vlm.checkpoints.folders import base_file, read_json, resolve, unavailable
from anyres_vlm.checkpoints.load_save import clean_generation_config, clean_padding, empty_model, load_pretrained
from anyres_vlm.checkpoints.tokenizer import image_token_id, load_tokenizer
from anyres_vlm.checkpoints.weights import cast_parameters, has_tied_head, parameters_on_meta
from anyres_vlm.config import CheckpointConfig, EncoderConfig, ModelConfig
from anyres_vlm.errors import DataError
from anyres_vlm.model.encoder import ClipEncoder, Encoder, TimmEncoder
from anyres_vlm.model.vlm import VisionLanguageModel

# Raised by libraries that read published models: files that are missing or cut off, wrong shapes, other formats.
BROKEN = (OSError, ValueError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError)


def build_model(
    config: ModelConfig | CheckpointConfig,
    seed: int,
    dtype: torch.dtype = torch.float32,
    *,
    llm_dtype: torch.dtype | None = None,
    read: bool = True,
) -> tuple[VisionLanguageModel, PreTrainedTokenizerFast]:
    """Return a model and its tokenizer with `<image>` in it, from base models or from a checkpoint.

    Base models get a projector and a newline that are initialised from `seed`; a checkpoint has both. All parameters
    are of `dtype`, those of the language model of `llm_dtype` if given; buffers keep their own. Unless weights are
    `read`, parameters are on the meta device.
    """
    if isinstance(config, CheckpointConfig):
        model, tokenizer = load_pretrained(config.checkpoint, config.template, dtype, llm_dtype=llm_dtype, read=read)
        model.configure(config.apply(model.config))
        return model, tokenizer
    tokenizer = load_tokenizer(config.llm)
    with nullcontext() if read else parameters_on_meta():
        language_model = _load_llm(config.llm, llm_dtype or dtype, read)
        _fit_vocabulary(language_model, tokenizer)
        encoder = load_encoder(config.encoder, read=read)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = VisionLanguageModel(config, encoder, language_model, image_token_id(tokenizer))
    if read:  # transformers ties no head that its file has besides other embeddings, and leaves the configuration
        language_model.config.tie_word_embeddings = has_tied_head(model)
    cast_parameters(model, dtype, llm_dtype)
    return model, tokenizer


def load_encoder(config: EncoderConfig, *, read: bool = True) -> Encoder:
    """Load a vision encoder in fp32, or build it without its weights, with the pixel statistics of its checkpoint."""
    name = resolve(config.name)
    try:
        if config.kind == "timm":
            network = timm_network(config, pretrained=read)
            pixels = network.pretrained_cfg
            return TimmEncoder(network, config.layer, pixels["mean"], pixels["std"])
        mean, std = _clip_statistics(name)
        if not read:
            vision_model = CLIPVisionModel(CLIPVisionConfig.from_pretrained(name))
            return ClipEncoder(vision_model, config.layer, mean, std)
        vision_model, report = CLIPVisionModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    except BROKEN as error:
        raise unavailable("encoder", config.name, error) from error
    _require_all_weights("encoder", config.name, report)
    return ClipEncoder(vision_model, config.layer, mean, std)


def skeleton(config: ModelConfig | CheckpointConfig, layers: int | None = None) -> VisionLanguageModel:
    """Return the model with uninitialised weights on torch's default device, with all or the first `layers` layers.

    `layers` applies to the language model. The vocabulary is the language model's own, so there is no extra row for an
    `<image>` token that the tokenizer lacks. Raises `DataError` for a model whose configuration is neither known nor
    available.
    """
    described = describe_bases(config)
    if layers is not None:
        described = replace(described, text=_shortened(described.text_config, layers))
    return empty_model(described)


def _shortened(text: Any, layers: int) -> Any:
    """Return the configuration with this many layers, `layer_types` truncated accordingly."""
    settings = text.to_dict() | {"num_hidden_layers": layers}
    if settings.get("layer_types"):
        settings["layer_types"] = settings["layer_types"][:layers]
    return type(text).from_dict(settings)


def _clip_statistics(name: str) -> tuple[list[float], list[float]]:
    """Return mean and deviation of the encoder's image processor; CLIP's own if the checkpoint has no processor."""
    try:
        processor: Any = CLIPImageProcessor.from_pretrained(name)
    except OSError:
        return list(OPENAI_CLIP_MEAN), list(OPENAI_CLIP_STD)
    return list(processor.image_mean), list(processor.image_std)


def _load_llm(name: str, dtype: torch.dtype, read: bool) -> PreTrainedModel:
    place, options = resolve(name), {"trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(place, **options)
        clean_padding(config, f"llm {name}")
        if (path := base_file(place, "generation_config.json")) is not None:
            options["generation_config"] = clean_generation_config(read_json(Path(path)), f"llm {name}")
        if read:
            llm, report = AutoModelForCausalLM.from_pretrained(
                place, config=config, dtype=dtype, output_loading_info=True, **options
            )
            _require_all_weights("llm", name, report)
        else:
            llm = AutoModelForCausalLM.from_config(config, dtype=dtype)
            llm.generation_config = options.get("generation_config", llm.generation_config)
    except BROKEN as error:
        raise unavailable("llm", name, error) from error
    if "generation_config" not in options:  # then config.json may hold generation settings
        llm.generation_config = clean_generation_config(llm.generation_config.to_diff_dict(), f"llm {name}")
    return cast(PreTrainedModel, llm)


def _require_all_weights(what: str, name: str, report: dict[str, Any]) -> None:
    """Raise `DataError` for a base model with weights missing, which transformers would fill with random numbers."""
    if missing := sorted(report["missing_keys"]):
        names = ", ".join(missing[:3])
        raise DataError(f"{what} {name!r}: {len(missing)} weights missing ({names}): use a complete folder")


def _fit_vocabulary(language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Add rows for added tokens; a vocabulary that is padded beyond the tokenizer is not changed.

    A new row is the mean of all others: the same in every process, and never the most likely next token.
    """
    rows = language_model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) <= rows:
        return
    language_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for layer in (language_model.get_input_embeddings(), language_model.get_output_embeddings()):
        for parameter in layer.parameters():  # a head may have a bias
            parameter.data[rows:] = parameter.data[:rows].mean(0, dtype=torch.float32).to(parameter.dtype)
