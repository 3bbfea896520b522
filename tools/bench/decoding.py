#!/usr/bin/env python3
"""Greedy generation, compared with stock `LlavaNextForConditionalGeneration.generate`: same weights and prompts.

    tools/bench/decoding.py                    both shapes: one 2x2 image, and a batch of different prompts
    tools/bench/decoding.py --shape like_7b --json

`one image` is a 672x672 image (2,928 positions) with a short question. `batch` has images of several shapes and prompts
without an image, which stock pads on the left. Tokens/s are new tokens divided by the time of encoder, prompt and
decoding. The two alternate and must generate the same tokens. Times are medians of CPU time, in fp32 with one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from common import add_quick, of_peer
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from anyres_vlm.config import EncoderConfig, ModelConfig
from anyres_vlm.errors import UsageError
from anyres_vlm.geometry import Size, TilePlan, plan_tiles
from anyres_vlm.inference.generation import Decoding, stream_tokens
from anyres_vlm.model.encoder import ClipEncoder
from anyres_vlm.model.vlm import VisionLanguageModel

LEAST_ROUNDS = 5
QUICK = {"new_tokens": 16}
TILE = 336
IMAGE_TOKEN, PAD_TOKEN = 3, 0
ONE_IMAGE = [(20, Size(height=672, width=672))]
BATCH = [  # words and image of each prompt
    (20, Size(height=672, width=672)),
    (30, Size(height=200, width=300)),
    (40, None),
    (300, None),
]


@dataclass(frozen=True)
class Shape:
    """A language model and an encoder for it, like CLIP ViT-L/14-336 but smaller."""

    width: int
    inner: int
    layers: int
    heads: int
    vocabulary: int
    encoder_width: int
    encoder_layers: int


SHAPES = {
    "like_7b": Shape(512, 1376, 12, 8, 4096, 256, 6),  # the proportions of a 7B model
    "wide_vocab": Shape(256, 688, 6, 4, 32064, 192, 6),  # most of the work is in the head
}


@dataclass(frozen=True)
class Prompts:
    """The same prompts in the form that each of the two models takes."""

    lengths: list[int]
    packed: Tensor  # (1, L)
    tiles: Tensor  # (T, 3, S, S) uint8
    plans: list[TilePlan]
    stock: dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), action="append", help="may be repeated (default: both)")
    parser.add_argument("--rounds", type=int, default=LEAST_ROUNDS, help=f"alternating rounds ({LEAST_ROUNDS} or more)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens of each answer (64)")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    add_quick(parser, QUICK)
    arguments = parser.parse_args()
    figures = run(arguments.shape or list(SHAPES), arguments.rounds, arguments.new_tokens)
    if arguments.json:
        json.dump(figures, sys.stdout, indent=2)
        print()
    else:
        show(figures)


def run(shapes: Sequence[str], rounds: int, new_tokens: int) -> dict[str, Any]:
    """Measure. Raises `UsageError` for too few rounds."""
    if rounds < LEAST_ROUNDS:
        raise UsageError(f"--rounds {rounds}: at least {LEAST_ROUNDS}")
    torch.set_num_threads(1)
    results = []
    for name in shapes:
        ours, stock = build(SHAPES[name])
        for title, sizes in (("one image", ONE_IMAGE), ("batch", BATCH)):
            prompts = make_prompts(ours, sizes, SHAPES[name].vocabulary)
            results.append({"shape": name, "prompts": title, **compare(ours, stock, prompts, new_tokens, rounds)})
    ratios = {f"{row['shape']}, {row['prompts']}": row.pop("ratios") for row in results}
    return {"rounds": rounds, "new_tokens": new_tokens, "results": results, "ratios": ratios}


def show(figures: dict[str, Any]) -> None:
    """Print what `run` returned."""
    print(
        f"{figures['new_tokens']} new tokens per prompt, fp32, one thread, "
        f"medians of {figures['rounds']} alternating rounds, tokens equal"
    )
    print(f"{'shape':<12}{'prompts':<11}{'positions':>10}{'stock':>9}{'ours':>9}{'ratio':>7}   first token: stock ours")
    for row in figures["results"]:
        rates = f"{row['stock_tokens_per_second']:>9.1f}{row['ours_tokens_per_second']:>9.1f}{row['ratio']:>7.2f}"
        first = f"{row['stock_first_token_s']:>20.2f} s {row['ours_first_token_s']:.2f} s"
        print(f"{row['shape']:<12}{row['prompts']:<11}{row['positions']:>10,}{rates}{first}")


def build(shape: Shape) -> tuple[VisionLanguageModel, LlavaNextForConditionalGeneration]:
    """Return our model with random weights, and the stock model with the same weights."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=shape.encoder_width,
        intermediate_size=4 * shape.encoder_width,
        num_hidden_layers=shape.encoder_layers,
        num_attention_heads=shape.encoder_width // 64,
        image_size=TILE,
        patch_size=14,
    )
    text = LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=4096,
        initializer_range=0.06,  # so that no two tokens are almost equally likely, where rounding would decide
        eos_token_id=None,
    )
    encoder = ClipEncoder(CLIPVisionModel(vision), -2, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    names = ModelConfig(llm="random", encoder=EncoderConfig(name="random"), template="plain")
    ours = VisionLanguageModel(names, encoder, LlamaForCausalLM(text), IMAGE_TOKEN).eval()
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=LlamaConfig(**{**text.to_dict(), "_attn_implementation": "sdpa"}),
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=[[canvas.height, canvas.width] for canvas in ours.tiling.canvases],
    )
    stock = LlavaNextForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()
    stock.model.vision_tower.load_state_dict(encoder.vision_model.state_dict())
    stock.model.language_model.load_state_dict(ours.language_model.base_model.state_dict())
    stock.model.multi_modal_projector.load_state_dict(ours.multi_modal_projector.state_dict())
    stock.lm_head.load_state_dict(ours.language_model.lm_head.state_dict())
    stock.model.image_newline.data.copy_(ours.image_newline.data)
    return ours, stock


def make_prompts(model: VisionLanguageModel, sizes: Sequence[tuple[int, Size | None]], vocabulary: int) -> Prompts:
    """Return prompts of random words, each with or without a random image."""
    generator = torch.Generator().manual_seed(1)
    rows, tiles, plans = [], [], []
    for words, size in sizes:
        row = torch.randint(IMAGE_TOKEN + 1, vocabulary, (words,), generator=generator)
        if size is not None:
            plan = plan_tiles(size, model.tiling)
            plans.append(plan)
            tiles.append(torch.randint(0, 256, (plan.num_tiles, 3, TILE, TILE), generator=generator).to(torch.uint8))
            row = torch.cat([torch.full((plan.total_tokens,), IMAGE_TOKEN), row])
        rows.append(row)
    longest = max(map(len, rows))
    most = max(len(tile) for tile in tiles)
    pixels = [model.vision_tower.normalise(tile) for tile in tiles]
    stock = {
        "input_ids": torch.stack([torch.nn.functional.pad(r, (longest - len(r), 0), value=PAD_TOKEN) for r in rows]),
        "attention_mask": torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in rows]),
        "pixel_values": torch.stack([torch.cat([p, p.new_zeros(most - len(p), *p.shape[1:])]) for p in pixels]),
        "image_sizes": torch.tensor([[plan.image.height, plan.image.width] for plan in plans]),
    }
    return Prompts([len(row) for row in rows], torch.cat(rows)[None], torch.cat(tiles), plans, stock)


def compare(
    ours: VisionLanguageModel,
    stock: LlavaNextForConditionalGeneration,
    prompts: Prompts,
    new_tokens: int,
    rounds: int,
) -> dict[str, Any]:
    """Return the rates and their ratio. The time to the first token is that of generating one token."""

    def answer(count: int = new_tokens) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in prompts.lengths]
        tokens = stream_tokens(ours, prompts.packed, prompts.lengths, prompts.tiles, prompts.plans, Decoding(count))
        for place, token in tokens:
            answers[place].append(token)
        return answers

    def stock_answer(count: int = new_tokens) -> list[list[int]]:
        out = stock.generate(
            **prompts.stock, max_new_tokens=count, do_sample=False, use_cache=True, pad_token_id=PAD_TOKEN
        )
        return out[:, prompts.stock["input_ids"].shape[1] :].tolist()

    timed: dict[str, Callable[[], list[list[int]]]] = {
        "stock": stock_answer,
        "ours": answer,
        "stock_first": lambda: stock_answer(1),
        "ours_first": lambda: answer(1),
    }
    times: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):
        generated = {}
        for name, call in timed.items():
            start = time.process_time()
            generated[name] = call()
            times[name].append(time.process_time() - start)
        assert generated["ours"] == generated["stock"], "both models generate the same tokens"
    seconds = {name: statistics.median(values) for name, values in times.items()}
    count = new_tokens * len(prompts.lengths)
    return {
        "positions": sum(prompts.lengths),
        "stock_tokens_per_second": count / seconds["stock"],
        "ours_tokens_per_second": count / seconds["ours"],
        "ratio": seconds["stock"] / seconds["ours"],
        "ratios": of_peer(times["stock"], times["ours"]),
        "stock_first_token_s": seconds["stock_first"],
        "ours_first_token_s": seconds["ours_first"],
    }


if __name__ == "__main__":
    main()
