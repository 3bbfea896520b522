"""The recipe: which parts each stage trains, at which rates, AdamW over them, the schedule, and known mistakes."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers.modeling_layers import GradientCheckpointingLayer

from anyres_vlm.config import STAGES, RunConfig, StageConfig, StageName
from anyres_vlm.model.lora import is_adapter
from anyres_vlm.model.quantize import decoder_matrices, quantize
from anyres_vlm.model.vlm import VisionLanguageModel

ADAPTER_PARTS = ("multi_modal_projector", "image_newline")
LORA_PART = "lora"  # the adapters in the language model

_LAST: tuple[StageName, ...] = ("stage2",)
# part of the model -> the stages that train it, and its rate there; without a rate it stays frozen
TRAINED_PARTS: dict[str, tuple[tuple[StageName, ...], Callable[[StageConfig], float | None]]] = {
    "multi_modal_projector": (STAGES, lambda stage: stage.learning_rate),
    "image_newline": (STAGES, lambda stage: stage.learning_rate),
    "vision_tower": (STAGES, lambda stage: stage.vision_lr),
    "language_model": (_LAST, lambda stage: None if stage.lora else stage.learning_rate),
    LORA_PART: (_LAST, lambda stage: (stage.lora.learning_rate or stage.learning_rate) if stage.lora else None),
}


def trained_rates(config: RunConfig, stage: StageName) -> dict[str, float]:
    """Return the parts of the model that a stage trains, with their learning rates."""
    rates = {part: rate(config.stage(stage)) for part, (stages, rate) in TRAINED_PARTS.items() if stage in stages}
    return {part: rate for part, rate in rates.items() if rate is not None}


def part_of(name: str) -> str:
    """Return the part of the model that a parameter belongs to."""
    return LORA_PART if is_adapter(name) else name.partition(".")[0]


def recompute_activations(model: VisionLanguageModel, every: bool | int, parts: Collection[str]) -> None:
    """Recompute the activations of every n-th layer of the language model in the backward pass, or of all if `True`.

    With any of them, those of all blocks of the encoder are recomputed if it is among the trained parts.
    """
    if not every:
        return
    model.language_model.activation_checkpointing_enable()
    layers = (module for module in model.language_model.modules() if isinstance(module, GradientCheckpointingLayer))
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number % int(every) == 0
    if "vision_tower" in parts:
        model.vision_tower.enable_checkpointing()


def freeze(model: VisionLanguageModel, parts: Collection[str]) -> None:
    """Let gradients reach just these parts. All others run as in evaluation, without dropout or drop path.

    The encoder's layers after the deepest chosen one always stay frozen.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in parts)
    for parameter in model.vision_tower.unused_parameters():
        parameter.requires_grad_(False)
    for name, part in model.named_children():
        part.train(name in parts)
    for name, module in model.named_modules():
        if name.endswith(".lora_dropout"):
            module.train(LORA_PART in parts)
        # transformers recomputes activations only in layers in training mode; their dropout modules keep their own mode
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            module.training = True


def frozen_matrices(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the frozen weights that autocast casts to bf16 wherever they are used, so bf16 copies give the same result.

    Embeddings, and heads tied to them, are not among them: autocast leaves a look-up in fp32.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        if type(module) in (nn.Linear, nn.Conv2d):
            weight = module.weight
            if isinstance(weight, nn.Parameter) and not weight.requires_grad and id(weight) not in embeddings:
                yield weight


def shrink_frozen(
    model: VisionLanguageModel,
    config: RunConfig,
    stage: StageName,
    dtype: torch.dtype,
    device: torch.device | None,
    *,
    is_split: bool,
) -> None:
    """Hold frozen weights in as few bytes as their use allows; the rest of a quantised language model gets `dtype`.

    Layers that the stage quantises are packed from bf16 on the device, unless that is None. Outside DeepSpeed, frozen
    matrices of a run in bf16 are held in bf16.
    """
    language_model = model.language_model
    if config.stage(stage).is_quantized and device is not None:
        for _, layer in decoder_matrices(language_model):
            layer.weight.data = layer.weight.data.to(torch.bfloat16)
        quantize(language_model, "4bit", lambda _: device)
        for parameter in language_model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    if config.precision == "bf16" and not is_split:
        for weight in frozen_matrices(model):
            weight.data = weight.data.to(torch.bfloat16)


def build_optimizer(model: nn.Module, rates: Mapping[str, float], weight_decay: float) -> AdamW:
    """Build AdamW over what requires gradients, each part at its own rate; biases and norms are never decayed."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((rates[part_of(name)], decay), []).append(parameter)
    return AdamW(
        [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()],
        fused=torch.cuda.is_available(),
    )


def rate_factor(step: int, total_steps: int, warmup_ratio: float, floor: float) -> float:
    """Share of the peak rate: linear over the first `ceil(ratio * total)` steps, then cosine down to `floor`."""
    warmup = math.ceil(warmup_ratio * total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(total_steps - warmup, 1)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def build_schedule(optimizer: AdamW, settings: StageConfig, total_steps: int, finished: int) -> LambdaLR:
    """Build the schedule of one stage, stepped once an optimizer step, as it stands after the finished ones."""
    floor = settings.eta_min / settings.learning_rate
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return LambdaLR(
        optimizer, lambda step: rate_factor(step, total_steps, settings.warmup_ratio, floor), last_epoch=finished - 1
    )


def recipe_warnings(config: RunConfig, stage: StageName) -> list[str]:
    """Return one line for each setting that is known to spoil the recipe."""
    settings = config.stage(stage)
    warnings = []
    if config.stage1.learning_rate == config.stage2.learning_rate:
        warnings.append(
            f"both stages use learning_rate={settings.learning_rate:g}: the recipe aligns at 1e-3 and tunes at 2e-5; "
            "one rate for both undertrains the projector or damages the language model"
        )
    if settings.epochs > 1:
        warnings.append(
            f"{stage} runs {settings.epochs} epochs: the recipe runs 1; more tends to overfit the language model"
        )
    if stage == "stage2" and config.model.pinpoints is None and config.model.grid == "1x1":
        warnings.append("grid 1x1 shows the model only the thumbnail: small text is unreadable, use --grid 2x2 to read")
    return warnings
