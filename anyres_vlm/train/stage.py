"""What each stage of the recipe trains, and the recipe's known mistakes."""

from __future__ import annotations

from anyres_vlm.config import RunConfig, StageName
from anyres_vlm.model.vlm import VisionLanguageModel

ADAPTER_PARTS = ("multi_modal_projector", "image_newline")
TRAINED_PARTS: dict[StageName, tuple[str, ...]] = {
    "stage1": ADAPTER_PARTS,
    "stage2": (*ADAPTER_PARTS, "language_model"),
}


def trained_parts(config: RunConfig, stage: StageName) -> tuple[str, ...]:
    """The parts of the model that a stage trains; `vision_lr` adds the encoder."""
    vision = ("vision_tower",) if config.stage(stage).vision_lr is not None else ()
    return (*TRAINED_PARTS[stage], *vision)


def freeze(model: VisionLanguageModel, parts: tuple[str, ...]) -> None:
    """Let gradients reach just these parts."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".")[0] in parts)


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
