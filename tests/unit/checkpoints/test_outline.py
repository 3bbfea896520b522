"""Without reading weights, a model has the structure of the one with them: other ranks are broadcast into it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from anyres_vlm.checkpoints.bases import build_model
from anyres_vlm.checkpoints.weights import allocate, has_tied_head
from anyres_vlm.config import CheckpointConfig, LoraSettings, ModelConfig
from anyres_vlm.model.lora import add_lora
from anyres_vlm.train.recipe import freeze


def tied_llm(bases: Path, folder: Path, *, keep_head: bool) -> Path:
    """A copy of the language model whose configuration ties the head, of which the file may hold another."""
    shutil.copytree(bases / "llm", folder / "llm")
    config = json.loads((folder / "llm" / "config.json").read_text())
    (folder / "llm" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    weights = load_file(folder / "llm" / "model.safetensors")
    if not keep_head:
        del weights["lm_head.weight"]
    save_file(weights, folder / "llm" / "model.safetensors", metadata={"format": "pt"})
    return folder / "llm"


def make(kind: str, bases: Path, checkpoint: Path, tmp_path: Path) -> ModelConfig | CheckpointConfig:
    if kind == "checkpoint":
        return CheckpointConfig(checkpoint=str(checkpoint))
    config: dict[str, Any] = {"llm": str(bases / "llm"), "encoder": {"name": str(bases / "vit")}, "template": "tiny"}
    if kind.startswith("tied"):
        config["llm"] = str(tied_llm(bases, tmp_path, keep_head=kind == "tied, another head"))
    if kind == "timm":
        network = timm.create_model("test_vit", num_classes=0, img_size=64)
        save_for_hf(network, str(tmp_path / "vit"), safe_serialization=True)
        config["encoder"] = {"kind": "timm", "name": str(tmp_path / "vit"), "tile": 32}
    return ModelConfig.model_validate(config)


@pytest.mark.parametrize("kind", ["bases", "tied", "tied, another head", "timm", "checkpoint"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_outline_has_the_structure_of_the_model(
    tiny_bases: Path, checkpoint: Path, tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    config = make(kind, tiny_bases, checkpoint, tmp_path)
    whole, _ = build_model(config, seed=0, dtype=dtype)
    outline, _ = build_model(config, seed=0, dtype=dtype, read=False)
    assert all(parameter.is_meta for parameter in outline.parameters())
    for model in (whole, outline):
        add_lora(model, LoraSettings(rank=2), seed=0)
        freeze(model, ["multi_modal_projector", "lora"])
    assert has_tied_head(whole) == (kind == "tied")
    allocate(outline, is_tied=has_tied_head(whole))
    assert not any(tensor.is_meta for tensor in (*outline.parameters(), *outline.buffers()))

    def facts(model: Any) -> list[tuple[Any, ...]]:
        return [(n, p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()]

    assert facts(outline) == facts(whole)
    assert outline.state_dict().keys() == whole.state_dict().keys()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(outline.buffers(), whole.buffers(), strict=True))
    ties = [model.language_model.config.tie_word_embeddings for model in (outline, whole)]
    assert ties[0] == ties[1]
