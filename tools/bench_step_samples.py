"""Generated samples and models for `bench_step.py`: one recipe in two shapes, ours and stock's with the same weights.

Everything is a 7B recipe scaled down. Token numbers follow stage 2: the kinds of image of `bench_packing.py` at a
quarter of their sides, tiles of 84 pixels (36 tokens), text so long that 60 to 65% of all tokens are visual.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from bench_packing import COMMON
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

from anyres_vlm.config import EncoderConfig, ModelConfig
from anyres_vlm.data.loader import Loaded
from anyres_vlm.geometry import Size, Tiling, plan_tiles
from anyres_vlm.model.encoder import ClipEncoder
from anyres_vlm.model.vlm import VisionLanguageModel
from anyres_vlm.schema import IGNORE_INDEX, Sample

TILE, PATCH, SHRINK = 84, 14, 4  # pixels, pixels, and the factor between real images' sides and these
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
IMAGE_TOKEN_ID, FIRST_WORD = 3, 4
SUPERVISED = 0.4  # of the text: the answers' part


@dataclass(frozen=True)
class Shape:
    """A language model: Llama-like, its encoder a quarter as wide and three quarters as deep, as CLIP-L is to a 7B."""

    hidden: int
    layers: int
    words: int


SHAPES = {"wide_vocab": Shape(256, 6, 32_064), "like_7b": Shape(512, 12, 4096)}


def make_samples(count: int, words: int, seed: int) -> list[Loaded]:
    """Samples with their tiles: 8% text only, the others with one image, one in ten of them with a second."""
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
    """How images are cut: LLaVA-NeXT's set of canvases, with small tiles."""
    return model_config().tiling(TILE, PATCH)


def model_config() -> ModelConfig:
    """The recipe's model; its parts are generated."""
    return ModelConfig(llm="generated", encoder=EncoderConfig(name="generated"), template="vicuna_v1")


def make_ours(shape: Shape) -> VisionLanguageModel:
    """A random model for stage 2: the encoder frozen."""
    torch.manual_seed(0)
    encoder = ClipEncoder(CLIPVisionModel(_vision(shape)), -2, MEAN, STD)
    model = VisionLanguageModel(model_config(), encoder, LlamaForCausalLM(_text(shape)), IMAGE_TOKEN_ID)
    model.vision_tower.requires_grad_(False)
    return model.train()


def make_stock(shape: Shape, ours: VisionLanguageModel) -> LlavaNextForConditionalGeneration:
    """transformers' model with the same weights, its encoder frozen as well, with its best attention for the CPU."""
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
    """What stock calls one of our parameters once it is loaded."""
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
