"""Checkpoint folders: stock `LlavaNextForConditionalGeneration` wherever stock transformers can express the model.

Besides transformers' files there is `anyres.json` with what they have no place for: template, dialect, layout and
projector. A model that stock cannot express is saved the same way under this project's own model type.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import timm
import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.initialization import no_init_weights

from anyres_vlm.checkpoints.describe import (
    EXTRAS_FILE,
    Description,
    checkpoint_folder,
    describe,
    parsing,
    read_json,
    read_tensors,
    weight_bytes,
)
from anyres_vlm.checkpoints.stock import pixel_statistics, stock_config, stock_obstacle, stock_processor
from anyres_vlm.checkpoints.tokenizer import build_tokenizer
from anyres_vlm.config import TemplateName
from anyres_vlm.errors import DataError
from anyres_vlm.model.encoder import ClipEncoder, Encoder, TimmEncoder
from anyres_vlm.model.vlm import VisionLanguageModel
from anyres_vlm.schema import IMAGE_TOKEN

logger = logging.getLogger(__name__)

Renamings = Sequence[tuple[str, str]]
"""Regular expressions of the start of a name and what stands there instead; the first that fits is taken."""

HEAD = "language_model.lm_head.weight"
STOCK_NAMES: Renamings = (
    # Released files and ours carry `vision_tower.vision_model.` and `language_model.model.`; files of transformers 5
    # lack the first, and what its models name their parts in memory has `model.` before all and no second.
    (r"(?:model\.)?vision_tower\.(?:vision_model\.)?", "vision_tower.vision_model."),
    (r"(?:model\.)?(multi_modal_projector\.|image_newline$)", r"\1"),
    (r"model\.language_model\.", "language_model.model."),
    (r"lm_head\.", "language_model.lm_head."),
)
# Buffers that older releases saved and newer ones compute.
COMPUTED = re.compile(r"\.embeddings\.position_ids$|\.rotary_emb\.inv_freq$")


def renamed(name: str, renamings: Renamings) -> str:
    """The name in this package's model."""
    for pattern, replacement in renamings:
        if match := re.match(pattern, name):
            return match.expand(replacement) + name[match.end() :]
    return name


def load_weights(
    model: VisionLanguageModel, tensors: Iterable[tuple[str, Tensor]], folder: Path, dtype: torch.dtype | None
) -> None:
    """Take tensors of this package's names over, cast to `dtype` or as they are. The model's own memory is replaced.

    Word embeddings are tied where the configuration says so and the folder holds no other head. Raises `DataError` for
    a name or a shape that does not fit.
    """
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if COMPUTED.search(name):
            continue
        if name not in expected or tensor.shape != expected[name]:
            wanted = f"expected {tuple(expected[name])}" if name in expected else "no such weight was expected"
            raise DataError(f"{folder}: {name} of shape {tuple(tensor.shape)}: {wanted}, as its config.json says")
        if not tensor.is_floating_point():
            raise DataError(f"{folder}: {name} holds {tensor.dtype}, expected floating-point numbers")
        found[name] = tensor.to(dtype or tensor.dtype, copy=True)  # a copy: the file's memory is one piece
    config, embeddings = model.language_model.config, model.language_model.get_input_embeddings().weight
    if config.tie_word_embeddings and HEAD in found:
        name = next(name for name, parameter in model.named_parameters() if parameter is embeddings)
        config.tie_word_embeddings = name not in found or torch.equal(found[HEAD], found[name])
    missing = expected.keys() - found.keys() - ({HEAD} if config.tie_word_embeddings else set())
    if missing:
        raise DataError(
            f"{folder}: weights missing: {', '.join(sorted(missing)[:3])}; use a complete checkpoint folder"
        )
    model.load_state_dict(found, strict=False, assign=True)
    model.language_model.tie_weights()


# Other values are valid or not depending on these, so they are tried first.
MODES = ("do_sample", "num_beams", "return_dict_in_generate", "use_cache")
IGNORED = ("transformers_version", "_from_model_config", "_commit_hash", "_original_object_hash")


def clean_generation_config(settings: Mapping[str, Any], where: str) -> GenerationConfig:
    """A config of all settings that can be saved together; one line of log names the others and why they are dropped.

    Every setting is tried by transformers' own strict validation, so this holds for the rules of any release.
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


def end_tokens(config: GenerationConfig) -> set[int]:
    """Its end tokens; a config names none, one or a list."""
    ending: Any = config.eos_token_id
    return set() if ending is None else {ending} if isinstance(ending, int) else set(ending)


def clean_padding(config: PreTrainedConfig, where: str) -> None:
    """Drop a padding id outside the vocabulary, such as -1: the embedding would take another row for padding."""
    settings: Any = config.get_text_config()
    pad, rows = getattr(settings, "pad_token_id", None), getattr(settings, "vocab_size", None)
    if isinstance(pad, int) and isinstance(rows, int) and not 0 <= pad < rows:
        settings.pad_token_id = None
        logger.info("%s: pad_token_id=%d dropped, the vocabulary has %d rows", where, pad, rows)


def _refusal(settings: Mapping[str, Any], name: str) -> str | None:
    """Why these settings cannot be saved with the one of this name, in a few words; None if they can."""
    if name.endswith("_token_id"):
        ids = settings[name] if isinstance(settings[name], list) else [settings[name]]
        if not ids or not all(type(number) is int and number >= 0 for number in ids):
            return "not a token id"
    config = GenerationConfig()
    for key, value in settings.items():
        setattr(config, key, value)
    try:
        config.validate(strict=True)
        config.to_json_string()
    except Exception as error:  # values of any JSON type reach comparisons that were written for numbers
        return _short(str(error))
    return None


def _short(message: str) -> str:
    """The rule without the advice around it."""
    text = " ".join(message.split())
    if "only used in sample-based" in text:
        return "only used with do_sample"
    if "only used in beam-based" in text:
        return "only used with num_beams above 1"
    return text.removeprefix("GenerationConfig is invalid: ")[:160]


LAYER_BYTES = 1000  # at the least: names and places of a layer's weights take as much in a file's header


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
    extras = {"model": model.config.model_dump(mode="json"), "pixel_mean": pixel_statistics(model.vision_tower.mean)}
    extras["pixel_std"] = pixel_statistics(model.vision_tower.std)
    extras["image_position"] = model.image_position
    (folder / EXTRAS_FILE).write_text(json.dumps(extras, indent=2) + "\n", encoding="utf-8")
    tied = [HEAD] if settings["tie_word_embeddings"] else None
    save_torch_state_dict(
        {name: tensor.contiguous() for name, tensor in weights.items()},
        folder,
        max_shard_size="5GB",
        shared_tensors_to_discard=tied,
    )
    model.language_model.generation_config.save_pretrained(folder)
    tokenizer.chat_template = chat_template
    if stock_obstacle(model) is None:
        stock_processor(model, tokenizer, chat_template).save_pretrained(folder)
    else:
        tokenizer.save_pretrained(folder)


def load_pretrained(
    name: Path | str, template: TemplateName | None = None, dtype: torch.dtype | None = torch.float32
) -> tuple[VisionLanguageModel, PreTrainedTokenizerFast]:
    """A model and tokenizer of a folder or hub id, `save_pretrained`'s or a stock LlavaNext checkpoint.

    `template` replaces the one that the folder has; `dtype=None` keeps that of each weight. Raises `DataError` naming
    what is missing, broken or not supported.
    """
    folder = checkpoint_folder(name)
    described = describe(folder, template)
    tokenizer = read_tokenizer(folder, described)
    with parsing(folder / "config.json", "the model that it describes"):
        vision = [] if isinstance(described.vision, dict) else [described.vision]
        require_weights([described.text, *vision], lambda: empty_model(described), folder)
        model = empty_model(described)
    load_weights(model, _tensors(folder, described), folder, dtype)
    settings = model.language_model.generation_config.to_diff_dict()
    if (folder / "generation_config.json").exists():
        settings = read_json(folder / "generation_config.json")
    generation = model.language_model.generation_config = clean_generation_config(settings, str(folder))
    if generation.eos_token_id is None:
        generation.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer


def empty_model(described: Description) -> VisionLanguageModel:
    """A model whose weights are still to come."""
    with no_init_weights():
        model = VisionLanguageModel(
            described.config, _empty_encoder(described), _empty_llm(described), described.image_token_id
        )
    model.image_position = described.image_position
    return model


def require_weights(parts: Sequence[PreTrainedConfig], build: Callable[[], nn.Module], folder: Path) -> None:
    """Raises `DataError` for a model larger than its folder's weights, before anything of that size is made.

    `build` makes the model, or the parts of it that the folder must hold, of these configurations.
    """
    size = weight_bytes(folder)
    layers = sum(part.num_hidden_layers for part in parts)
    if min(part.num_attention_heads for part in parts) < 1:
        raise DataError(f"{folder}: config.json says a model without attention heads")
    held = f"its weights have {size:,} bytes: fetch it again"
    if layers * LAYER_BYTES > size:
        raise DataError(f"{folder}: config.json says {layers} layers, {held}")
    with torch.device("meta"):
        numbers = sum(parameter.numel() for parameter in build().parameters())
    if numbers > size:
        raise DataError(f"{folder}: config.json says {numbers:,} numbers, {held}")


def read_tokenizer(folder: Path, described: Description) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint folder, with the chat template of its processor.

    Raises `DataError` if it does not go with the model, or has no chat template and none of ours was named.
    """
    tokenizer = build_tokenizer(folder, "")
    if (found := tokenizer.get_vocab().get(IMAGE_TOKEN)) != described.image_token_id:
        raise DataError(
            f"{folder}: {IMAGE_TOKEN} is token {found} of its tokenizer, config.json says {described.image_token_id}"
        )
    if len(tokenizer) > described.text.vocab_size:
        raise DataError(
            f"{folder}: its tokenizer has {len(tokenizer)} tokens, its language model {described.text.vocab_size}"
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
    """The chat template of a folder's processor, in the order in which transformers' processors look for it.

    None leaves the tokenizer's own, for which AutoTokenizer has read `chat_template.jinja`.
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


def load_parts(model: VisionLanguageModel, folder: Path, parts: tuple[str, ...]) -> None:
    """Copy the weights of some parts of the model, such as `multi_modal_projector`, out of a folder of this package."""
    wanted = {name: tensor for name, tensor in model.state_dict().items() if name.split(".")[0] in parts}
    found = dict(read_tensors(folder, wanted))
    if model.language_model.config.tie_word_embeddings:
        wanted.pop(HEAD, None)
    for name, tensor in wanted.items():
        if name not in found or found[name].shape != tensor.shape:
            got = "nothing" if name not in found else f"shape {tuple(found[name].shape)}"
            raise DataError(
                f"{folder}: expected {name} of shape {tuple(tensor.shape)}, got {got}; use the same base models"
            )
    model.load_state_dict(found, strict=False)


def _empty_encoder(described: Description) -> Encoder:
    layer, vision = described.config.encoder.layer, described.vision
    if isinstance(vision, CLIPVisionConfig):
        return ClipEncoder(CLIPVisionModel(vision), layer, described.mean, described.std)
    options = {**vision.get("model_args", {}), "img_size": vision["image_size"]}
    network = timm.create_model(vision["architecture"], pretrained=False, num_classes=0, **options)
    return TimmEncoder(network, layer, described.mean, described.std)


def _empty_llm(described: Description) -> PreTrainedModel:
    return cast(PreTrainedModel, AutoModelForCausalLM.from_config(described.text, dtype=torch.float32))


def _tensors(folder: Path, described: Description) -> Iterator[tuple[str, Tensor]]:
    """The folder's weights under this package's names; a projector without biases gets biases of zero."""
    for name, tensor in read_tensors(folder):
        name = renamed(name, STOCK_NAMES)
        yield name, tensor
        if not described.projector_bias and name.startswith("multi_modal_projector."):
            yield name.replace(".weight", ".bias"), tensor.new_zeros(tensor.shape[0])
