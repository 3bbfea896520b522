"""Optimizer steps in every split of the same documents, compared with one big unpacked batch, on one or more ranks.

The reference knows nothing of packs, ranks or engines: one document a forward by transformers' eager attention, a dense
loss, one division by the supervised tokens, torch's own clipping and AdamW. Engines take the fused AdamW, as on a GPU.
Usage, also under a launcher:

    python step_matrix.py BASES fp32|bf16 RESULTS.json
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import AdamW

sys.path.append(str(Path(__file__).parents[2] / "tools" / "check"))
from memory_case import gradient_bytes, static_bytes

from anyres_vlm.checkpoints.bases import build_model
from anyres_vlm.config import LoraSettings, load_config, shipped_config
from anyres_vlm.data.loader import Loaded, collate
from anyres_vlm.geometry import Size, plan_tiles
from anyres_vlm.model.encoder import TimmEncoder
from anyres_vlm.model.lora import add_lora
from anyres_vlm.model.vlm import VisionLanguageModel
from anyres_vlm.preflight.estimate.activations import StepBytes
from anyres_vlm.preflight.estimate.memory import RankMemory, count_parameters, numbers_of, rank_memory, read_sharding
from anyres_vlm.schema import IGNORE_INDEX, Batch, Sample
from anyres_vlm.train.engine.deepspeed_settings import find_preset, resolve_deepspeed
from anyres_vlm.train.engine.engine import Engine
from anyres_vlm.train.recipe import ADAPTER_PARTS, LORA_PART, build_optimizer, freeze, recompute_activations

MICRO_STEPS = (1, 2, 4)
BACKENDS = ("plain", "zero1", "zero2", "zero3")
# DeepSpeed's own AdamW for the CPU is not compiled for the presets that offload: torch's steps there.
SPLITS = [*product(BACKENDS, MICRO_STEPS), ("zero2_offload", 2), ("zero3_offload", 2)]
# Models of which ZeRO-3 partitions every tensor; in small models it usually keeps all of them whole.
KINDS = ("CLIP", "timm", "LoRA", "tied", "checkpointing")
PARTITIONED = "zero3 without whole tensors"
# For each step what the second half of its documents is, which is rank 1's share where there are two ranks.
STEPS = ("images", "text", "unsupervised", "nothing")
WORDS = 300  # in the tiny vocabulary; the first five are special
PARTS = 8  # of a step's documents; a split joins neighbours to its packs
RATES = dict.fromkeys(("multi_modal_projector", "image_newline", "vision_tower", "language_model"), 1e-3)
LORA = {LORA_PART: 1e-3}
MAX_GRAD_NORM = 9.0  # the norms of these steps are 5 to 14: some are clipped and some are not
EPS = 1e-3  # with its usual 1e-8, AdamW makes whole steps of gradients that are rounding alone, as of a key's bias

Steps = list[list[list[Loaded]]]


def build(bases: Path, kind: str = "CLIP") -> VisionLanguageModel:
    names = [f"model.llm={bases}/llm", f"model.encoder.name={bases}/vit"]
    model, _ = build_model(load_config(shipped_config("tiny"), names).model, seed=0)
    if kind == "timm":
        torch.manual_seed(0)
        options = {"img_size": 28, "patch_size": 14, "embed_dim": 32, "depth": 3, "num_heads": 2}
        network = timm.create_model("vit_tiny_patch16_224", num_classes=0, **options)
        model.vision_tower = TimmEncoder(network, -2, [0.5] * 3, [0.5] * 3)
    if kind == "tied":
        model.language_model.config.tie_word_embeddings = True
        model.language_model.lm_head.weight = model.language_model.model.embed_tokens.weight
    if kind == "LoRA":
        add_lora(model, LoraSettings(rank=4), seed=0)
    recompute_activations(model, kind == "checkpointing", rates(kind))
    freeze(model, rates(kind))
    return model


def rates(kind: str) -> dict[str, float]:
    return RATES if kind != "LoRA" else {part: rate for part, rate in RATES.items() if part in ADAPTER_PARTS} | LORA


def adamw(model: VisionLanguageModel, kind: str, *, fused: bool) -> AdamW:
    optimizer = build_optimizer(model, rates(kind), weight_decay=0.0)
    for group in optimizer.param_groups:
        group |= {"eps": EPS, "fused": fused}
    return optimizer


def document(model: VisionLanguageModel, rng: random.Random, *, images: int, supervised: bool) -> Loaded:
    """A random document of 2 to 40 words with its images anywhere in it and a label on half of the words or none."""
    ids = [rng.randrange(5, WORDS) for _ in range(rng.randint(2, 40))]
    labels = [word if supervised and rng.random() < 0.5 else IGNORE_INDEX for word in ids]
    labels[-1] = ids[-1] if supervised else IGNORE_INDEX
    plans = tuple(
        plan_tiles(Size(height=rng.randint(5, 90), width=rng.randint(5, 90)), model.tiling) for _ in range(images)
    )
    for _ in plans:
        place = rng.randint(0, len(ids) - 1)
        ids.insert(place, model.image_token_id)
        labels.insert(place, IGNORE_INDEX)
    side, pixels = model.tiling.tile, np.random.default_rng(rng.randrange(1 << 30))
    tiles = [pixels.integers(0, 256, (plan.num_tiles, 3, side, side), dtype=np.uint8) for plan in plans]
    return Sample("", np.array(ids, np.int32), np.array(labels, np.int32), (), plans), tiles


def make_steps(model: VisionLanguageModel) -> Steps:
    """For each optimizer step its documents in parts, of unequal lengths and numbers of labels."""
    steps: Steps = []
    for kind in STEPS:
        rng = random.Random(kind)
        first = [[document(model, rng, images=1, supervised=True)] for _ in range(PARTS // 2)]
        images = {"images": (1, 2), "unsupervised": (0, 1)}.get(kind, (0,))
        second = [
            [document(model, rng, images=rng.choice(images), supervised=kind != "unsupervised")] * (kind != "nothing")
            for _ in range(PARTS // 2)
        ]
        steps.append(first + second)
    return steps


def reference(bases: Path, kind: str) -> tuple[dict[str, Tensor], list[float], list[float]]:
    """Return the weights after all steps, and the loss and gradient norm of each step."""
    model = build(bases, kind)
    model.language_model.set_attn_implementation("eager")
    optimizer = adamw(model, kind, fused=False)
    losses, norms = [], []
    for parts in make_steps(model):
        rows = [collate([loaded], model.tiling.tile, model.image_token_id) for part in parts for loaded in part]
        total = torch.stack([dense_loss(model, row) for row in rows]).sum()
        loss = total / sum(int((row.labels[0, 1:] != IGNORE_INDEX).sum()) for row in rows)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return {name: tensor.detach() for name, tensor in model.named_parameters()}, losses, norms


def dense_loss(model: VisionLanguageModel, row: Batch) -> Tensor:
    embedded = model.embed(row.input_ids, row.tiles, row.plans)
    logits = model.language_model(inputs_embeds=embedded, use_cache=False).logits[0]
    return F.cross_entropy(logits[:-1], row.labels[0, 1:], ignore_index=IGNORE_INDEX, reduction="sum")


def share(engine: Engine, model: VisionLanguageModel, parts: list[list[Loaded]], micro_steps: int) -> list[Batch]:
    """This rank's packs of one step, neighbouring parts joined; ranks take consecutive ones."""
    each = PARTS // (micro_steps * engine.world_size)
    packs = [[loaded for part in parts[i : i + each] for loaded in part] for i in range(0, PARTS, each)]
    mine = packs[engine.rank * micro_steps : (engine.rank + 1) * micro_steps]
    return [collate(pack, model.tiling.tile, model.image_token_id) for pack in mine]


def predict(model: VisionLanguageModel, backend: str, precision: str, ranks: int) -> RankMemory:
    """Return what `anyres estimate` expects a rank to hold, activations left out."""
    sharding = read_sharding(None if backend == "plain" else backend)
    count = count_parameters(model, sharding)
    return rank_memory(count, sharding, numbers_of(sharding, precision), ranks, StepBytes(0, 0, 0), fused=False)


def compare(
    engine: Engine, bases: Path, precision: str, expected: Any, backend: str, micro_steps: int, kind: str = "CLIP"
) -> dict[str, Any]:
    """Return the largest differences from the reference, and bytes predicted and allocated; weights are rank 0's."""
    model = build(bases, kind)
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    steps = [share(engine, model, parts, micro_steps) for parts in make_steps(model)]
    config = load_config(shipped_config("tiny"), [f"stage2.max_grad_norm={MAX_GRAD_NORM}", f"precision={precision}"])
    preset = backend.partition(" ")[0]
    settings = None if backend == "plain" else resolve_deepspeed(find_preset(preset), config, "stage2")
    if settings is not None and backend == PARTITIONED:
        settings.content["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    predicted = predict(model, preset, precision, engine.world_size)
    engine.prepare(model, adamw(model, kind, fused=True), MAX_GRAD_NORM, settings)
    gradients: list[int] = []  # before each forward pass
    hook = model.register_forward_pre_hook(lambda *_: gradients.append(gradient_bytes(engine, model)))
    results = [engine.step(batches) for batches in steps]
    hook.remove()
    held = static_bytes(engine, model)
    found = engine.weights()
    if not engine.is_main:
        return {}
    weights, losses, norms = expected
    ours, theirs = (torch.cat([(w[n] - before[n]).flatten() for n in weights]).double() for w in (found, weights))
    return {
        "weights": float((ours - theirs).abs().max()),
        "update": float((ours - theirs).norm() / theirs.norm()),
        "loss": max(abs(result.loss / loss - 1) for result, loss in zip(results, losses, strict=True)),
        "norm": max(abs(result.grad_norm / norm - 1) for result, norm in zip(results, norms, strict=True)),
        "clipped": sum(norm > MAX_GRAD_NORM for norm in norms),
        "bytes": {
            "weights": (predicted.weights, held["weights"]),
            "optimizer": (predicted.masters + predicted.moments, held["masters"] + held["moments"]),
            "gradients": (predicted.gradients, gradients[-1]),
        },
    }


def run(bases: Path, precision: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the differences of each combination of ranks, backend and micro-steps, or of ranks and kind of model."""
    engine = Engine.start(precision, rank_timeout_minutes=5)
    expected = reference(bases, "CLIP") if engine.is_main else None
    for backend, micro_steps in SPLITS:
        yield (
            f"{engine.world_size} {backend} {micro_steps}",
            compare(engine, bases, precision, expected, backend, micro_steps),
        )
    for kind in KINDS if engine.world_size > 1 else ():
        expected = reference(bases, kind) if engine.is_main else None
        yield kind, compare(engine, bases, precision, expected, PARTITIONED, 2, kind)
    engine.wait()
    engine.close()


if __name__ == "__main__":
    results = dict(run(Path(sys.argv[1]), sys.argv[2]))
    if any(results.values()):  # rank 0
        Path(sys.argv[3]).write_text(json.dumps(results, indent=1), encoding="utf-8")
