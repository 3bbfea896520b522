"""Low-rank adapters (LoRA) in the language model's linear layers, injected in place by peft.

The injection adds no wrapper around the model, so attention, loss and generation work unchanged; only the weight of an
adapted layer moves to `base_layer`, next to `lora_A` and `lora_B`.

Saved weights are merged, under their plain names: every folder is a complete checkpoint that needs no further step. The
adapter is saved next to them in peft's own format. The checkpoints of a run also keep the adapter's tensors with the
optimizer state: merging rounds, and a run resumed from rounded weights would not be the same run.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor, nn

from anyres_vlm.config import LoraSettings
from anyres_vlm.errors import UsageError
from anyres_vlm.model.vlm import VisionLanguageModel

ADAPTER_FOLDER = "adapter"
_NAME = "default"  # peft's name of a model's first adapter


def is_adapter(name: str) -> bool:
    """Return whether a parameter of the model belongs to the adapter."""
    return ".lora_" in name


def add_lora(model: VisionLanguageModel, settings: LoraSettings, seed: int) -> None:
    """Add adapters to the language model: A is drawn from `seed` as for a new linear layer, B is 0.

    The model's output does not change until B is trained. Raises `UsageError` for `target_modules` that are not linear
    layers of the decoder.
    """
    head = model.language_model.get_output_embeddings()
    named = model.language_model.named_modules()
    linear = {name.rpartition(".")[2] for name, module in named if isinstance(module, nn.Linear) and module is not head}
    targets = set(settings.target_modules or linear)
    if not targets or not targets <= linear:
        raise UsageError(
            f"lora.target_modules: expected linear layers of {model.config.llm}'s decoder, which are "
            f"{', '.join(sorted(linear)) or 'none'}; got {', '.join(sorted(targets - linear)) or 'none'}"
        )
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=sorted(targets),
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.config.llm,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model.language_model, adapter_name=_NAME)


def merged_weights(weights: dict[str, Tensor], settings: LoraSettings) -> dict[str, Tensor]:
    """Return the state dict without adapters: W + alpha / rank * B A under the plain name of W.

    Neither the model nor `weights` changes. Merged tensors are on the CPU, where a second copy of the model fits.
    """
    merged = {}
    for name, tensor in weights.items():
        layer, is_adapted, kind = name.rpartition(".base_layer.")
        if is_adapted and kind == "weight":
            low, high = (weights[f"{layer}.lora_{half}.{_NAME}.weight"] for half in "AB")
            merged[f"{layer}.weight"] = (tensor + (high @ low) * (settings.alpha / settings.rank)).cpu()
        elif not is_adapter(name):
            merged[f"{layer}.{kind}" if is_adapted else name] = tensor
    return merged


def save_adapter(model: VisionLanguageModel, weights: dict[str, Tensor], folder: Path) -> None:
    """Write `adapter/` into a checkpoint folder, for `PeftModel.from_pretrained` on the base language model."""
    config: LoraConfig = model.language_model.peft_config[_NAME]
    config.save_pretrained(str(folder / ADAPTER_FOLDER))
    tensors = {_peft_name(name): tensor.contiguous() for name, tensor in weights.items() if is_adapter(name)}
    save_file(tensors, folder / ADAPTER_FOLDER / "adapter_model.safetensors", metadata={"format": "pt"})


def _peft_name(name: str) -> str:
    return f"base_model.model.{name.removeprefix('language_model.').replace(f'.{_NAME}.', '.')}"
