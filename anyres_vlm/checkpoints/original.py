"""Load checkpoints in the original LLaVA-NeXT layout, in which its authors publish them.

The configuration keys (`mm_*`, `image_*`) and weight names are those of LLaVA's training code. Settings that this
package does not support are refused. Pinpoints are pairs (width, height) in that layout, hence the dialect `llava`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.initialization import no_init_weights

from anyres_vlm.checkpoints.bases import load_encoder
from anyres_vlm.checkpoints.folders import checkpoint_folder, parsing, read_json
from anyres_vlm.checkpoints.load_save import clean_generation_config
from anyres_vlm.checkpoints.tokenizer import image_token_id, load_tokenizer
from anyres_vlm.checkpoints.weights import HEAD, Renamings, load_weights, read_tensors, renamed, require_weights
from anyres_vlm.config import EncoderConfig, ModelConfig, Pinpoints, TemplateName
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.model.vlm import VisionLanguageModel

FAMILIES = {"LlavaLlamaForCausalLM": "llama", "LlavaMistralForCausalLM": "mistral", "LlavaQwenForCausalLM": "qwen2"}
RELEASED = "llava-v1.6-vicuna: vicuna_v1, -mistral: mistral, -34b: chatml_direct, llama3-llava-next: llama_3"
NAMES: Renamings = (
    (r"model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
    (r"model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"model\.mm_projector\.(weight|bias)$", r"multi_modal_projector.linear.\1"),
    (r"model\.image_newline$", "image_newline"),
    (r"model\.vision_tower\.vision_tower\.(?:vision_model\.)?", "vision_tower.vision_model."),
    (r"model\.", "language_model.model."),
    (r"lm_head\.", "language_model.lm_head."),
)
ROWS = ("language_model.model.embed_tokens.weight", HEAD)


def load_original(
    name: str | Path, template: TemplateName | None, encoder: str | None = None
) -> tuple[VisionLanguageModel, PreTrainedTokenizerFast]:
    """Load a model and its tokenizer; each weight keeps its dtype. Encoder weights in the folder, if any, are used.

    `encoder` replaces the tower that the configuration names. Raises `DataError` for a folder that is broken or not
    supported, `UsageError` without a template.
    """
    folder = checkpoint_folder(name)
    where = folder / "config.json"
    settings = read_json(where)
    with parsing(where, "the model that it describes"):
        text = _text_config(settings, where)
        tower = encoder or settings.get("mm_vision_tower") or settings.get("vision_tower")
        if not tower:
            raise DataError(f"{where}: no mm_vision_tower: name the encoder with --encoder")
        config = _model_config(settings, where, str(name), str(tower), template)
    tokenizer = load_tokenizer(str(folder))
    rows = text.vocab_size = max(int(text.vocab_size), len(tokenizer))
    vision_tower = load_encoder(config.encoder)

    def build() -> PreTrainedModel:
        with no_init_weights():
            return cast(PreTrainedModel, AutoModelForCausalLM.from_config(text, dtype=torch.float32))

    with parsing(where, "the model that it describes"):
        require_weights([text], build, folder)
        model = VisionLanguageModel(config, vision_tower, build(), image_token_id(tokenizer))
        model.image_position = "front"  # as in the original training code
    load_weights(model, _original_tensors(folder, rows, model, settings), folder, None)
    if (folder / "generation_config.json").exists():
        generation = read_json(folder / "generation_config.json")
        model.language_model.generation_config = clean_generation_config(generation, str(folder))
    return model, tokenizer


def _text_config(settings: dict[str, Any], where: Path) -> Any:
    """Return the language model's configuration: the keys that its family has, without LLaVA's own."""
    architecture = (settings.get("architectures") or ["?"])[0]
    if architecture not in FAMILIES or not ({"mm_vision_tower", "mm_projector_type"} & settings.keys()):
        kinds = ", ".join(FAMILIES)
        remedy = " (a LlavaNext folder needs no import)" if settings.get("model_type") == "llava_next" else ""
        raise DataError(f"{where}: architecture {architecture!r}, expected the original layout of {kinds}{remedy}")
    kind = CONFIG_MAPPING[FAMILIES[architecture]]
    known = kind().to_dict().keys() | {"rope_theta", "rope_scaling"}
    own = {key: value for key, value in settings.items() if key in known - {"model_type", "architectures"}}
    try:
        return kind(**own)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise DataError(f"{where}: not a {architecture} configuration: {' '.join(str(error).split())}") from None


def _model_config(
    settings: dict[str, Any], where: Path, name: str, tower: str, template: TemplateName | None
) -> ModelConfig:
    def supported(key: str, default: object, reason: str, *values: object) -> Any:
        value = settings.get(key, default)
        if value not in values:
            raise DataError(f"{where}: {key}={value!r}: {reason}")
        return value

    aspect = settings.get("image_aspect_ratio") or "square"  # LLaVA's default
    if aspect != "anyres":
        raise DataError(f"{where}: image_aspect_ratio={aspect!r} {_aspect_obstacle(str(aspect))}")
    projector = supported("mm_projector_type", "linear", "linear and mlp2x_gelu are supported", "linear", "mlp2x_gelu")
    layout = supported("mm_patch_merge_type", "flat", "flat and spatial_unpad are supported", "flat", "spatial_unpad")
    supported("mm_vision_select_feature", "patch", "features with CLS are not supported", "patch")
    supported("mm_use_im_start_end", False, "tokens around an image are not supported", False, None)
    supported("mm_resampler_type", None, "resamplers are not supported", None)
    layer = settings.get("mm_vision_select_layer", -2)
    if not isinstance(layer, int):
        raise DataError(f"{where}: mm_vision_select_layer={layer!r}: expected a number")
    if template is None:
        raise UsageError(f"--template: this layout does not record it; released models use {RELEASED}")
    return ModelConfig(
        llm=name,
        encoder=EncoderConfig(name=tower, layer=layer),
        projector=projector,
        template=template,
        pinpoints=_pinpoints(settings.get("image_grid_pinpoints"), where),
        layout=layout,
        dialect="llava",
    )


def _aspect_obstacle(aspect: str) -> str:
    """Return why a treatment of images is not supported, and what to use instead."""
    instead = "import an AnyRes checkpoint (llava-v1.6-*), or train from the base models with grid: 1x1"
    if aspect == "pad":
        return f"(LLaVA-1.5) pads a picture to a square, which is not supported yet: {instead}"
    if aspect == "square":
        return f"(LLaVA-1.0, or no key) crops a picture to its central square, which is not supported: {instead}"
    if aspect.startswith("anyres_max"):
        return f"shrinks the features of large pictures, which is not supported yet: {instead}"
    return "is not supported, expected 'anyres'"


def _pinpoints(listed: object, where: Path) -> tuple[tuple[int, int], ...] | str:
    """Return pairs of (width, height) as they are listed, or the text of a range of tiles."""
    found: tuple[tuple[int, int], ...] | str = ()
    with suppress(ValidationError):
        found = TypeAdapter(Pinpoints).validate_python(listed)
    if not found:
        raise DataError(f"{where}: image_grid_pinpoints={listed!r}: expected a list of pairs of pixels")
    return found


def _original_tensors(
    folder: Path, rows: int, model: VisionLanguageModel, settings: dict[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the folder's weights under this package's names, and those that it lacks.

    The rows of new tokens, such as `<image>`, are the mean of all rows, which is never the most likely token. The
    layout `flat` has no newline; the parameter exists but is not used, and is zero.
    """
    dtypes: dict[str, torch.dtype] = {}
    for original, tensor in read_tensors(folder):
        name = renamed(original, NAMES)
        dtypes[name.split(".")[0]] = tensor.dtype
        if name in ROWS and len(tensor) < rows:
            mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
            tensor = torch.cat([tensor, mean.expand(rows - len(tensor), -1)])
        yield name, tensor
    dtype = dtypes.get("multi_modal_projector")
    if "vision_tower" not in dtypes:
        if settings.get("unfreeze_mm_vision_tower"):
            raise DataError(
                f"{folder}: its encoder was trained (unfreeze_mm_vision_tower), but its weights are missing"
            )
        for name, tensor in model.vision_tower.state_dict().items():
            yield f"vision_tower.{name}", tensor.to(dtype)
    if "image_newline" not in dtypes and model.config.layout == "flat":
        yield "image_newline", torch.zeros_like(model.image_newline, dtype=dtype)
