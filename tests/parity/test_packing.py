"""A pack equals its documents run alone: logits, loss and gradients of several families, transformers as the oracle.

Alone means one document a forward, by transformers' own eager attention and a dense loss over all its positions.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

from anyres_vlm.config import EncoderConfig, ModelConfig
from anyres_vlm.data.loader import Loaded, collate
from anyres_vlm.errors import UsageError
from anyres_vlm.geometry import Size, plan_tiles
from anyres_vlm.model.encoder import ClipEncoder
from anyres_vlm.model.vlm import VisionLanguageModel
from anyres_vlm.schema import IGNORE_INDEX, Batch, Sample

# Relative to the largest entry. Worst over packs of 1 to 20 documents, 40 seeds a family, fp32 on CPU:
LOGITS_TOL = 1e-5  # 1.6e-6
LOSS_TOL = 2e-6  # 2.4e-7
GRADIENT_TOL = 3e-4  # 7e-5, in a parameter whose gradient almost cancels; the cosine of all differs from 1 by 2e-12
COSINE_TOL = 1e-9

WORDS, IMAGE, TILE = 300, 4, 28
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "gemma": {"head_dim": 16},
    "qwen3": {"head_dim": 16},
    "phi3": {"pad_token_id": 0},
    "gemma3_text": {"head_dim": 16, "sliding_window": 512, "num_hidden_layers": 6},  # one layer in six is global
}
Runs = dict[str, torch.Tensor]


def language_config(family: str, **changes: Any) -> Any:
    shape = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": WORDS,
        "initializer_range": 0.2,  # large enough that attention differs between positions
    }
    return AutoConfig.for_model(family, **shape | FAMILIES.get(family, {}) | changes)


def vision_config() -> CLIPVisionConfig:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    return CLIPVisionConfig(**shape, image_size=TILE, patch_size=14)


def make_model(language: Any, layout: str = "spatial_unpad") -> VisionLanguageModel:
    torch.manual_seed(0)
    config = ModelConfig(llm="random", encoder=EncoderConfig(name="random"), template="vicuna_v1", layout=layout)
    encoder = ClipEncoder(CLIPVisionModel(vision_config()), -2, (0.5,) * 3, (0.25,) * 3)
    return VisionLanguageModel(config, encoder, AutoModelForCausalLM.from_config(language), IMAGE).train()


def documents(model: VisionLanguageModel, seed: int, count: int, with_images: bool = True) -> list[Loaded]:
    """Generate documents of 1 to 60 words with up to two images at random positions and labels on random words."""
    rng, pixels = random.Random(seed), np.random.default_rng(seed)
    made = []
    for number in range(count):
        ids = [rng.randrange(5, WORDS) for _ in range(rng.choice((1, 2, rng.randint(3, 60))))]
        share = rng.choice((0.0, 0.3, 1.0))
        labels = [word if rng.random() < share else IGNORE_INDEX for word in ids]
        sizes = [Size(height=rng.randint(5, 90), width=rng.randint(5, 90)) for _ in range(rng.choice((0, 0, 1, 1, 2)))]
        plans = tuple(plan_tiles(size, model.tiling) for size in (sizes if with_images else []))
        for _ in plans:
            place = rng.randint(0, len(ids))
            ids.insert(place, IMAGE)
            labels.insert(place, IGNORE_INDEX)
        tiles = [pixels.integers(0, 256, (plan.num_tiles, 3, TILE, TILE), dtype=np.uint8) for plan in plans]
        made.append((Sample(str(number), np.array(ids, np.int32), np.array(labels, np.int32), (), plans), tiles))
    return made


def packed(model: VisionLanguageModel, pack: list[Loaded]) -> tuple[torch.Tensor, torch.Tensor, Runs]:
    """Return logits (L, V), loss and gradients of a pack, the logits from the input of the loss."""
    states = []
    hook = model.language_model.base_model.register_forward_hook(lambda *call: states.append(call[-1][0].detach()))
    model.zero_grad()
    loss = model(collate(pack, TILE, IMAGE))
    loss.backward()
    hook.remove()
    return model.language_model.get_output_embeddings()(states[0])[0].detach(), loss.detach(), gradients(model)


def alone(model: VisionLanguageModel, pack: list[Loaded]) -> tuple[torch.Tensor, torch.Tensor, Runs]:
    """Return the same from one forward pass per document, with plain transformers after the embeddings."""
    model.zero_grad()
    model.language_model.set_attn_implementation("eager")
    logits, losses = [], []
    for document in pack:
        row = collate([document], TILE, IMAGE)
        embedded = model.embed(row.input_ids, row.tiles, row.plans)
        logits.append(model.language_model(inputs_embeds=embedded, use_cache=False).logits[0])
        losses.append(F.cross_entropy(logits[-1][:-1], row.labels[0, 1:], ignore_index=IGNORE_INDEX, reduction="sum"))
        losses[-1].backward()
    model.language_model.set_attn_implementation("anyres")
    return torch.cat(logits).detach(), torch.stack(losses).sum().detach(), gradients(model)


def gradients(model: torch.nn.Module) -> Runs:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def differences(mine: tuple[Any, ...], theirs: tuple[Any, ...]) -> dict[str, float]:
    """Return differences of logits, loss and gradients relative to the largest entry, and the gradients' cosine."""
    assert mine[2].keys() == theirs[2].keys()
    largest = max(float(gradient.abs().max()) for gradient in theirs[2].values())
    worst = 0.0
    for name, gradient in theirs[2].items():
        # Some gradients are zero but for rounding (a key's bias moves no softmax): those are held to the largest.
        scale = max(float(gradient.abs().max()), 1e-3 * largest, 1e-12)
        worst = max(worst, float((mine[2][name] - gradient).abs().max()) / scale)
    flat = [torch.cat([side[2][name].flatten() for name in theirs[2]]).double() for side in (mine, theirs)]
    return {
        "logits": float((mine[0] - theirs[0]).abs().max() / theirs[0].abs().max()),
        "loss": abs(float(mine[1] / theirs[1]) - 1) if theirs[1] else float(mine[1]),
        "gradients": worst,
        "cosine": float(F.cosine_similarity(*flat, dim=0)) if largest else 1.0,
    }


def assert_equal(found: dict[str, float]) -> None:
    assert found["logits"] < LOGITS_TOL, found
    assert found["loss"] < LOSS_TOL, found
    assert found["gradients"] < GRADIENT_TOL, found
    assert found["cosine"] > 1 - COSINE_TOL, found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("count", "layout"), [(1, "spatial_unpad"), (7, "flat"), (20, "spatial_unpad")])
def test_packed_equals_alone(family: str, count: int, layout: str) -> None:
    model = make_model(language_config(family), layout)
    pack = documents(model, count, count)
    assert_equal(differences(packed(model, pack), alone(model, pack)))


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_packed_text_equals_alone(family: str) -> None:
    model = make_model(language_config(family))
    pack = documents(model, 5, 6, with_images=False)
    assert_equal(differences(packed(model, pack), alone(model, pack)))


def test_a_pack_is_stock_llava_next_document_by_document() -> None:
    """Run the released model with the same weights, from its own tiles and labels to loss and gradients."""
    language = language_config("llama")
    model = make_model(language)
    config = LlavaNextConfig(
        vision_config=vision_config(),
        text_config=language_config("llama"),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[canvas.height, canvas.width] for canvas in model.tiling.canvases],
    )
    stock = LlavaNextForConditionalGeneration(config).train()
    stock.load_state_dict({stock_name(name): tensor for name, tensor in model.state_dict().items()})
    pack = documents(model, 3, 12)
    logits, total = [], torch.zeros(())
    for document in pack:
        row = collate([document], TILE, IMAGE)
        out = stock(
            input_ids=row.input_ids, labels=row.labels, num_items_in_batch=1, use_cache=False, **stock_images(row)
        )
        out.loss.backward()
        logits.append(out.logits[0].detach())
        total += out.loss.detach()
    mine = packed(model, pack)
    theirs = gradients(stock)
    renamed = {stock_name(name): gradient for name, gradient in mine[2].items()}
    unused = theirs.keys() ^ renamed.keys()  # neither's loss depends on the encoder's last layer
    assert all("layers.2." in name or "post_layernorm" in name for name in unused), unused
    assert_equal(differences((mine[0], mine[1], renamed), (torch.cat(logits), total, theirs)))


def stock_name(name: str) -> str:
    if name == "language_model.lm_head.weight":
        return "lm_head.weight"
    name = name.replace("language_model.model.", "language_model.")
    return "model." + name.replace("vision_tower.vision_model.", "vision_tower.")


def stock_images(row: Batch) -> dict[str, torch.Tensor]:
    if not row.plans:
        return {}
    images = torch.split((row.tiles / 255 - 0.5) / 0.25, [plan.num_tiles for plan in row.plans])
    sizes = torch.tensor([[plan.image.height, plan.image.width] for plan in row.plans])
    return {"pixel_values": torch.nn.utils.rnn.pad_sequence(list(images), batch_first=True), "image_sizes": sizes}


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements of any tensor that an operation creates, backward included."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("family", FAMILIES)
def test_no_mask_of_the_whole_pack_is_ever_built(family: str) -> None:
    model = make_model(language_config(family))
    batch = collate([document for seed in range(3) for document in documents(model, seed, 20)], TILE, IMAGE)
    dense = batch.input_ids.shape[1] ** 2
    with LargestTensor() as seen:
        model(batch).backward()
    assert seen.elements < dense / 4
    model.language_model.set_attn_implementation("sdpa")  # what packs by positions alone: the measure would notice
    with LargestTensor() as seen, torch.no_grad(), pytest.raises(UsageError, match="separates documents in 0 of"):
        model(batch)
    assert seen.elements >= dense


def test_what_attention_cannot_do_exactly_is_refused() -> None:
    for changing in (language_config("gemma2", head_dim=16), language_config("granite", logits_scaling=8.0)):
        with pytest.raises(UsageError, match="caps or scales the logits"):
            make_model(changing)
    capped = make_model(language_config("gemma2", head_dim=16, final_logit_softcapping=None))
    with pytest.raises(UsageError, match="logit soft-capping is not supported"):
        capped(collate(documents(capped, 1, 3), TILE, IMAGE))
    for family in ("mistral", "gemma3_text"):
        model = make_model(language_config(family, sliding_window=8))
        with pytest.raises(UsageError, match="sliding window of 8: lower max_length to 8"):
            model(collate(documents(model, 1, 3), TILE, IMAGE))


@pytest.mark.parametrize("family", ["nemotron", "mamba", "bloom"])
def test_a_model_that_loses_the_documents_is_refused(family: str) -> None:
    """One model drops the keyword, one has no attention, one does not look up its attention function."""
    model = make_model(language_config(family))
    with pytest.raises(UsageError, match="separates documents in 0 of its 2 layers"):
        model(collate(documents(model, 3, 3), TILE, IMAGE))


def test_checkpointing_changes_nothing_but_memory() -> None:
    model = make_model(language_config("llama"))
    pack = documents(model, 2, 10)
    kept, plain = saved_bytes(lambda: packed(model, pack))
    model.language_model.activation_checkpointing_enable()
    least, checkpointed = saved_bytes(lambda: packed(model, pack))
    assert torch.equal(plain[1], checkpointed[1])
    assert all(torch.equal(plain[2][name], gradient) for name, gradient in checkpointed[2].items())
    assert least < 0.6 * kept


def saved_bytes(run: Callable[[], Any]) -> tuple[int, Any]:
    """Return the bytes that the forward pass saves for the backward pass, each storage once."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    return sum(kept.values()), result


def test_bf16_is_close() -> None:
    model = make_model(language_config("llama"))
    pack = documents(model, 4, 10)
    _, exact, fine = packed(model, pack)
    with torch.autocast("cpu", torch.bfloat16):
        _, rough, coarse = packed(model, pack)
    assert abs(float(rough / exact) - 1) < 1e-2  # worst of 40 seeds: 3e-3
    flat = [torch.cat([side[name].flatten() for name in fine]) for side in (fine, coarse)]
    assert float(F.cosine_similarity(*flat, dim=0)) > 0.99  # worst of 40 seeds: 0.998
