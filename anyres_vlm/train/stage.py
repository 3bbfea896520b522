"""What each stage of the recipe trains and at which rate, and the recipe's known mistakes."""

from __future__ import annotations

from collections.abc import Callable, Collection

from transformers.modeling_layers import GradientCheckpointingLayer

from anyres_vlm.config import RunConfig, StageConfig, StageName
from anyres_vlm.model.lora import is_adapter
from anyres_vlm.model.vlm import VisionLanguageModel

ADAPTER_PARTS = ("multi_modal_projector", "image_newline")
LORA_PART = "lora"  # the adapters in the language model

_BOTH: tuple[StageName, ...] = ("stage1", "stage2")
_LAST: tuple[StageName, ...] = ("stage2",)
# part of the model -> the stages that train it, and its rate there; without a rate it stays frozen
TRAINED_PARTS: dict[str, tuple[tuple[StageName, ...], Callable[[StageConfig], float | None]]] = {
    "multi_modal_projector": (_BOTH, lambda stage: stage.learning_rate),
    "image_newline": (_BOTH, lambda stage: stage.learning_rate),
    "vision_tower": (_BOTH, lambda stage: stage.vision_lr),
    "language_model": (_LAST, lambda stage: None if stage.lora else stage.learning_rate),
    LORA_PART: (_LAST, lambda stage: (stage.lora.learning_rate or stage.learning_rate) if stage.lora else None),
}


def trained_rates(config: RunConfig, stage: StageName) -> dict[str, float]:
    """The parts of the model that a stage trains, with their learning rates."""
    rates = {part: rate(config.stage(stage)) for part, (stages, rate) in TRAINED_PARTS.items() if stage in stages}
    return {part: rate for part, rate in rates.items() if rate is not None}


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to."""
    return LORA_PART if is_adapter(name) else name.partition(".")[0]


def freeze(model: VisionLanguageModel, parts: Collection[str]) -> None:
    """Let gradients reach just these parts. All others run as in evaluation, without dropout or drop path.

    The encoder's layers behind the deepest chosen one stay frozen with it or without.
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
        # transformers recomputes activations only in layers whose own flag says training; their dropout keeps its own
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            module.training = True


def recipe_warnings(config: RunConfig, stage: StageName) -> list[str]:
    """One line for each setting that is known to spoil the recipe."""
    settings = config.stage(stage)
    warnings = []
    if config.stage1.learning_rate == config.stage2.learning_rate:
        warnings.append(
            f"both stages use learning_rate={settings.learning_rate:g}: the recipe aligns at 1e-3 and tunes at 2e-5; "
            "one rate either leaves the projector behind or damages the language model"
        )
    if settings.epochs > 1:
        warnings.append(
            f"{stage} runs {settings.epochs} epochs: the recipe runs 1; more tends to overfit the language model"
        )
    if stage == "stage2" and config.model.pinpoints is None and config.model.grid == "1x1":
        warnings.append(
            "grid 1x1 shows the model the thumbnail alone: small text is unreadable, use --grid 2x2 to read"
        )
    return warnings
