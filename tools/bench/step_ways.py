"""Four methods for a stage-2 pass over the same samples: ours, and stock LlavaNext padded (grouped or not) and packed.

A method is a function that runs forward and backward over all of its batches, leaves the gradients in its model and
returns the loss in nats per supervised token. Batches are made in advance, as the workers of a loader do.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from data_packing import COMMON
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

from anyres_vlm.config import EncoderConfig, ModelConfig
from anyres_vlm.data.loader import Loaded, collate
from anyres_vlm.geometry import Size, Tiling, plan_tiles
from anyres_vlm.model.encoder import ClipEncoder
from anyres_vlm.model.vlm import VisionLanguageModel
from anyres_vlm.schema import IGNORE_INDEX, Batch, Sample

TILE, PATCH, SHRINK = 84, 14, 4  # pixels, pixels, and the factor by which these images are smaller than real ones
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
IMAGE_TOKEN_ID, FIRST_WORD = 3, 4
SUPERVISED = 0.4  # share of the text that is answers


@dataclass(frozen=True)
class Shape:
    """A Llama-like model; its encoder is a quarter as wide and three quarters as deep, as CLIP-L is for a 7B model."""

    hidden: int
    layers: int
    words: int


SHAPES = {"wide_vocab": Shape(256, 6, 32_064), "like_7b": Shape(512, 12, 4096)}


def make_samples(count: int, words: int, seed: int) -> list[Loaded]:
    """Return samples with their tiles: 8% text only, the others with one image, and one in ten of those with two."""
    rng = np.random.default_rng(seed)
    return [_sample(rng, str(number), words) for number in range(count)]


def _sample(rng: np.random.Generator, name: str, words: int) -> Loaded:
    kind = int(rng.choice(5, p=(0.08, 0.36, 0.24, 0.11, 0.21)))
    count = 0 if kind == 0 else 1 + int(rng.random() < 0.1)
    plans = tuple(plan_tiles(_size(rng, kind), tiling()) for _ in range(count))
    # text only, natural images, documents, charts, multi-turn: log-normal with these medians
    tokens = max(8, int(rng.lognormal(np.log((135, 44, 76, 44, 150)[kind]), (0.9, 0.7, 0.8, 0.6, 0.7)[kind])))
    ids = rng.integers(FIRST_WORD, words, min(tokens, 600)).astype(np.int32)
    labels = np.full_like(ids, IGNORE_INDEX)
    answers = max(1, round(SUPERVISED * len(ids)))
    labels[-answers:] = ids[-answers:]
    ids = np.concatenate([np.full(count, IMAGE_TOKEN_ID, np.int32), ids])
    labels = np.concatenate([np.full(count, IGNORE_INDEX, np.int32), labels])
    tiles = [rng.integers(0, 256, (plan.num_tiles, 3, TILE, TILE), dtype=np.uint8) for plan in plans]
    return Sample(name, ids, labels, (), plans), tiles


def _size(rng: np.random.Generator, kind: int) -> Size:
    if kind in (1, 4) and rng.random() < 0.8:
        height, width = COMMON[rng.integers(len(COMMON))]
    else:
        heights, widths = {2: ((1100, 2200), (900, 1700)), 3: ((250, 900), (330, 1200))}.get(kind, ((200, 1100),) * 2)
        height, width = int(rng.integers(*heights)), int(rng.integers(*widths))
    return Size(height=height // SHRINK, width=width // SHRINK)


def tiling() -> Tiling:
    """Return the tiling of images: the canvases of LLaVA-NeXT, with small tiles."""
    return model_config().tiling(TILE, PATCH)


def model_config() -> ModelConfig:
    """Return the model configuration of the recipe; its parts are generated."""
    return ModelConfig(llm="generated", encoder=EncoderConfig(name="generated"), template="vicuna_v1")


def make_ours(shape: Shape) -> VisionLanguageModel:
    """Return a random model for stage 2, with the encoder frozen."""
    torch.manual_seed(0)
    encoder = ClipEncoder(CLIPVisionModel(_vision(shape)), -2, MEAN, STD)
    model = VisionLanguageModel(model_config(), encoder, LlamaForCausalLM(_text(shape)), IMAGE_TOKEN_ID)
    model.vision_tower.requires_grad_(False)
    return model.train()


def make_stock(shape: Shape, ours: VisionLanguageModel) -> LlavaNextForConditionalGeneration:
    """Return the model of transformers with the same weights, encoder frozen, and its fastest attention on the CPU."""
    config: Any = LlavaNextConfig(
        vision_config=_vision(shape),
        text_config=_text(shape),
        image_token_index=IMAGE_TOKEN_ID,
        image_grid_pinpoints=[[canvas.height, canvas.width] for canvas in ours.tiling.canvases],
        image_seq_length=ours.tiling.patches,
    )
    config._attn_implementation = "sdpa"
    stock = LlavaNextForConditionalGeneration(config)
    stock.load_state_dict({stock_name(name): tensor for name, tensor in ours.state_dict().items()})
    stock.model.vision_tower.requires_grad_(False)
    return stock.train()


def stock_name(name: str) -> str:
    """Return the name of one of our parameters in the loaded stock model."""
    if name == "language_model.lm_head.weight":
        return "lm_head.weight"
    name = name.replace("language_model.model.", "language_model.")
    return "model." + name.replace("vision_tower.vision_model.", "vision_tower.")


def _text(shape: Shape) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=round(shape.hidden * 2.6875 / 32) * 32,  # 11008 / 4096
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 64,
        vocab_size=shape.words,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def _vision(shape: Shape) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=shape.hidden // 4,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers * 3 // 4,
        num_attention_heads=shape.hidden // 256 * 2,
        image_size=TILE,
        patch_size=PATCH,
    )


BATCH, CAPACITY = 8, 2048  # samples per padded batch; tokens per pack, which correspond to 16,384 for a 7B model

Pass = Callable[[], float]


class Ways:
    """Both models and the batches of every method."""

    def __init__(self, shape: str, count: int, seed: int, names: Sequence[str]) -> None:
        self.samples = make_samples(count, SHAPES[shape].words, seed)
        self.supervised = sum(sample.num_supervised for sample, _ in self.samples)
        self.ours = make_ours(SHAPES[shape])
        self.passes: dict[str, Pass] = {name: self._our_pass() for name in names if name == OURS}
        if self.passes.keys() != set(names):
            self.stock = make_stock(SHAPES[shape], self.ours)
            self.passes |= {name: self._stock_pass(STOCK[name](self.samples)) for name in names if name != OURS}

    def model(self, name: str) -> nn.Module:
        """Return the model in which a method leaves its gradients."""
        return self.ours if name == OURS else self.stock

    def gradients(self, name: str) -> dict[str, torch.Tensor]:
        """Return the gradients of a method, under the names of the stock model."""
        rename = stock_name if name == OURS else str
        parameters = self.model(name).named_parameters()
        return {rename(key): value.grad.clone() for key, value in parameters if value.grad is not None}

    def _our_pass(self) -> Pass:
        batches = [collate(pack, TILE, IMAGE_TOKEN_ID) for pack in first_fit(self.samples)]

        def run() -> float:
            self.ours.zero_grad()
            return sum(_step(self.ours(batch) / self.supervised) for batch in batches)

        return run

    def _stock_pass(self, batches: list[dict[str, Any]]) -> Pass:
        def run() -> float:
            self.stock.zero_grad()
            return sum(_step(self._stock_loss(batch)) for batch in batches)

        return run

    def _stock_loss(self, batch: dict[str, Any]) -> torch.Tensor:
        # With a cache, the stock model ignores positions that restart: a pack would be one document.
        loss: torch.Tensor = self.stock(**batch, use_cache=False, num_items_in_batch=self.supervised).loss
        return loss


def _step(loss: torch.Tensor) -> float:
    loss.backward()
    return loss.item()


def first_fit(samples: Sequence[Loaded]) -> list[list[Loaded]]:
    """Return packs of at most `CAPACITY` tokens, filled with the longest samples first."""
    packs: list[list[Loaded]] = []
    for sample in sorted(samples, key=_length, reverse=True):
        for pack in packs:
            if sum(map(_length, pack)) + _length(sample) <= CAPACITY:
                pack.append(sample)
                break
        else:
            packs.append([sample])
    return packs


def _length(sample: Loaded) -> int:
    return sample[0].length


def length_grouped(samples: Sequence[Loaded]) -> list[dict[str, Any]]:
    """Return padded batches of samples of similar length, sorted over the whole pass; samplers only sort in windows."""
    return _padded(sorted(samples, key=_length, reverse=True))


def randomly(samples: Sequence[Loaded]) -> list[dict[str, Any]]:
    """Return padded batches in random order."""
    return _padded(random.Random(0).sample(list(samples), len(samples)))


def _padded(samples: Sequence[Loaded]) -> list[dict[str, Any]]:
    return [_stock_inputs(samples[first : first + BATCH]) for first in range(0, len(samples), BATCH)]


def _stock_inputs(group: Sequence[Loaded]) -> dict[str, Any]:
    rows = [collate([sample], TILE, IMAGE_TOKEN_ID) for sample in group]
    width = max(row.input_ids.shape[1] for row in rows)
    padded = {"input_ids": torch.zeros(len(rows), width, dtype=torch.long)}
    padded["attention_mask"] = padded["input_ids"].clone()
    padded["labels"] = torch.full_like(padded["input_ids"], IGNORE_INDEX)
    for number, row in enumerate(rows):
        length = row.input_ids.shape[1]
        padded["input_ids"][number, :length] = row.input_ids[0]
        padded["attention_mask"][number, :length] = 1
        padded["labels"][number, :length] = row.labels[0]
    return padded | _stock_images(rows)


def packed_by_positions(samples: Sequence[Loaded]) -> list[dict[str, Any]]:
    """Return our packs in the form of the stock model: positions restart, and first tokens have no label."""
    batches = []
    for pack in first_fit(samples):
        row = collate(pack, TILE, IMAGE_TOKEN_ID)
        labels = row.labels.clone()
        labels[0, row.cu_seqlens[:-1].long()] = IGNORE_INDEX
        inputs = {"input_ids": row.input_ids, "position_ids": row.position_ids, "labels": labels}
        batches.append(inputs | _stock_images([row]))
    return batches


def _stock_images(rows: Sequence[Batch]) -> dict[str, Any]:
    """Return pixels in the form of the processor: normalised, one row of tiles per image, padded to the longest row."""
    plans = [plan for row in rows for plan in row.plans]
    if not plans:
        return {}
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    tiles = (torch.cat([row.tiles for row in rows]) / 255 - mean) / std
    pixels = torch.zeros(len(plans), max(plan.num_tiles for plan in plans), 3, TILE, TILE)
    for number, image in enumerate(torch.split(tiles, [plan.num_tiles for plan in plans])):
        pixels[number, : len(image)] = image
    sizes = torch.tensor([[plan.image.height, plan.image.width] for plan in plans])
    return {"pixel_values": pixels, "image_sizes": sizes}


OURS = "anyres"
STOCK = {
    "stock, length-grouped": length_grouped,
    "stock, random": randomly,
    "stock, packed": packed_by_positions,
}
