#!/usr/bin/env python3
"""Pretrain the embedded base models on rendered data: tokenizer, then language model and encoder separately.

    tools/pretrain/tiny.py tokenizer OUT && tools/pretrain/tiny.py lm OUT && tools/pretrain/tiny.py vit OUT

The language model is trained on plain text only, without images. The encoder is trained without sentences: every patch
predicts the characters whose centres it contains, and the colour and shape of the object at its centre. Both are seeded
and use the training split of the renderer only. Results and times are in tools/README.md.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from anyres_vlm.data.tiling import cut_tiles
from anyres_vlm.geometry import Grid, Size, TilePlan, Tiling, plan_tiles
from anyres_vlm.model.attention import ATTENTION_NAME, separated
from anyres_vlm.model.encoder import ClipEncoder
from anyres_vlm.model.loss import summed_loss
from anyres_vlm.schema import IGNORE_INDEX, supervision
from anyres_vlm.synthetic.prose import passages
from anyres_vlm.synthetic.rendering import Rendering, render
from anyres_vlm.synthetic.words import COLOURS, SHAPES

TILE, PATCH = 84, 14
TILING = Tiling.from_grid(Grid(2, 2), tile=TILE, patch=PATCH)
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.$%:-"
SLOTS = 3  # characters that a patch predicts, in reading order
LEGIBLE_PX = 5.0  # smaller glyphs, by their height on the tile, have no label
KINDS = ("scene", "scene", "sign", "receipt", "table", "chart", "page")
MEAN, STD = [0.5, 0.5, 0.5], [0.25, 0.25, 0.25]


def train_tokenizer(out: Path, texts: int) -> None:
    """Train a byte-level BPE of 1,024 tokens; capitals and digits are single tokens, so words on signs are spelled."""
    tokenizer = Tokenizer(models.BPE())
    pattern = Regex(r" ?[A-Z]| ?[a-z]+|\d| ?[^\sA-Za-z\d]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(map("".join, itertools.islice(passages(seed=0, tiling=TILING), texts)), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    fast.save_pretrained(out / "tiny-lm")
    print(f"tokenizer: {len(fast)} tokens")


class TextPacks(IterableDataset[tuple[Tensor, Tensor, Tensor, Tensor]]):
    """Endless packs of whole passages: ids and labels (1, L), position ids (1, L), boundaries (documents + 1,)."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, length: int, seed: int) -> None:
        self.tokenizer, self.length, self.seed = tokenizer, length, seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        documents: list[tuple[list[int], list[int]]] = []
        for given, follows in passages(self.seed, TILING):
            ids, rest = (self.tokenizer(text)["input_ids"] for text in (given, follows))
            if sum(len(known) for known, _ in documents) + len(ids) + len(rest) > self.length:
                yield pack(documents)
                documents = []
            documents.append((ids + rest, [IGNORE_INDEX] * len(ids) + rest))


def pack(documents: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Concatenate documents into one pack."""
    ids, labels = (torch.tensor([list(itertools.chain(*parts))]) for parts in zip(*documents, strict=True))
    lengths = [len(known) for known, _ in documents]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return ids, labels, positions, torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def train_lm(out: Path, steps: int) -> None:
    """Train a Llama-like causal language model on plain text: 2,048 tokens per step, in bf16 with fp32 weights."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "tiny-lm")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation(ATTENTION_NAME)

    packs = DataLoader(TextPacks(tokenizer, 2048, seed=1), batch_size=None, num_workers=1, prefetch_factor=8)
    fit(model, lambda batch: {"loss": text_loss(model, *batch)}, packs, steps, peak_rate=1.5e-3)
    model.set_attn_implementation("sdpa")
    copy.deepcopy(model).to(torch.float16).save_pretrained(out / "tiny-lm")
    model.set_attn_implementation(ATTENTION_NAME)
    unseen = list(itertools.islice(TextPacks(tokenizer, 2048, seed=1000), 20))
    with torch.inference_mode():
        loss = sum(float(text_loss(model, *batch)) for batch in unseen) / len(unseen)
    print(f"lm: held-out loss {loss:.3f} nats per token")


def text_loss(model: LlamaForCausalLM, ids: Tensor, labels: Tensor, positions: Tensor, ends: Tensor) -> Tensor:
    """Return the mean loss of a pack in nats per supervised token; documents do not attend to each other."""
    lengths = ends.diff().tolist()
    with torch.autocast("cpu", torch.bfloat16), separated(model, ends, lengths) as documents:
        hidden = model.model(
            input_ids=ids, position_ids=positions, documents=documents, use_cache=False
        ).last_hidden_state
    return summed_loss(hidden.float(), *supervision(labels, lengths), model.lm_head) / (labels != IGNORE_INDEX).sum()


class RenderedTiles(IterableDataset[tuple[Tensor, Tensor, Tensor, Tensor]]):
    """Endless batches of tiles with labels for each patch: tiles, characters, colours, shapes."""

    def __init__(self, batch: int, first: int) -> None:
        self.batch, self.first = batch, first

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for seed in itertools.count(self.first):
            rendering = render(KINDS[seed % len(KINDS)], seed, "train")
            size = Size(height=rendering.image.height, width=rendering.image.width)
            plan = plan_tiles(size, TILING)
            parts.append((torch.from_numpy(cut_tiles(rendering.image, plan)), *patch_labels(rendering, plan)))
            if sum(len(part[0]) for part in parts) >= self.batch:
                yield tuple(torch.cat(kind) for kind in zip(*parts, strict=True))  # type: ignore[misc]
                parts = []


def patch_labels(rendering: Rendering, plan: TilePlan) -> tuple[Tensor, Tensor, Tensor]:
    """Return the labels of all patches: characters (T, P, SLOTS), colours (T, P), shapes (T, P); 0 is nothing.

    -100 marks characters that are too small to read on the tile.
    """
    side, shape = plan.side, (plan.num_tiles, plan.side**2)
    characters, colours, shapes = (
        torch.zeros(*shape, SLOTS, dtype=torch.long),
        torch.zeros(shape),
        torch.zeros(shape),
    )
    filled = torch.zeros(shape, dtype=torch.long)
    for tile in range(plan.num_tiles):
        scale_y, scale_x, top, left = placement(plan, tile)
        for glyph in sorted(rendering.glyphs, key=lambda mark: mark.box[0]):
            y = (glyph.box[1] + glyph.box[3]) / 2 * scale_y + top
            x = (glyph.box[0] + glyph.box[2]) / 2 * scale_x + left
            if not (0 <= y < TILE and 0 <= x < TILE):
                continue
            patch = int(y // PATCH) * side + int(x // PATCH)
            slot = int(filled[tile, patch])
            if (glyph.box[3] - glyph.box[1]) * scale_y < LEGIBLE_PX and glyph.char.isalnum():
                characters[tile, patch] = -100
            elif slot < SLOTS and characters[tile, patch, slot] >= 0:
                characters[tile, patch, slot] = CHARACTERS.index(glyph.char) + 1
                filled[tile, patch] += 1
        for mark in rendering.objects:
            for row, col in itertools.product(range(side), range(side)):
                y, x = (row + 0.5) * PATCH, (col + 0.5) * PATCH
                inside_y = mark.box[1] * scale_y + top <= y < mark.box[3] * scale_y + top
                if inside_y and mark.box[0] * scale_x + left <= x < mark.box[2] * scale_x + left:
                    colours[tile, row * side + col] = COLOURS.index(mark.colour) + 1
                    shapes[tile, row * side + col] = SHAPES.index(mark.shape) + 1
    return characters, colours.long(), shapes.long()


def placement(plan: TilePlan, tile: int) -> tuple[float, float, float, float]:
    """Return the scale (vertical, horizontal) and corner (top, left) of the image on a tile, in pixels of the tile."""
    if tile == 0:
        return TILE / plan.image.height, TILE / plan.image.width, 0.0, 0.0
    row, col = divmod(tile - 1, plan.grid.cols)
    scale_y, scale_x = plan.resized.height / plan.image.height, plan.resized.width / plan.image.width
    return scale_y, scale_x, plan.top - row * TILE, plan.left - col * TILE


class Reader(nn.Module):
    """Linear heads on a patch feature: characters, colour, shape."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.characters = nn.Linear(width, SLOTS * (len(CHARACTERS) + 1))
        self.colour = nn.Linear(width, len(COLOURS) + 1)
        self.shape = nn.Linear(width, len(SHAPES) + 1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(T, P, Dv) -> logits (T, P, SLOTS, characters), (T, P, colours), (T, P, shapes)."""
        return (
            self.characters(features).unflatten(-1, (SLOTS, -1)),
            self.colour(features),
            self.shape(features),
        )


def train_vit(out: Path, steps: int) -> None:
    """Train a vision transformer of CLIP's shape to read patches, on about 64 tiles per step."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        image_size=TILE,
        patch_size=PATCH,
        hidden_act="gelu",
    )
    encoder = ClipEncoder(CLIPVisionModel(config), -2, MEAN, STD)
    readers = nn.ModuleList([Reader(config.hidden_size), Reader(config.hidden_size)])
    model = nn.ModuleList([encoder, readers])
    last_layer = encoder.vision_model.encoder.layers[-1]

    def measures(batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
        tiles, *wanted = batch
        features = encoder(tiles)
        found = readers[0](features)
        names = ("characters", "colours", "shapes")
        numbers = {name: recall(f, w) for name, f, w in zip(names, found, wanted, strict=True)}
        # The last layer is trained, too, so that users of the encoder get a complete one.
        losses = [
            F.cross_entropy(f.flatten(0, -2), w.flatten(), weight=blank_counts_less(f.shape[-1]))
            for outputs in (found, readers[1](last_layer(features, attention_mask=None)))
            for f, w in zip(outputs, wanted, strict=True)
        ]
        return {"loss": torch.stack(losses).sum(), **numbers}

    batches = DataLoader(RenderedTiles(64, first=0), batch_size=None, num_workers=1, prefetch_factor=8)
    fit(model, measures, batches, steps, peak_rate=1e-3)
    unseen = list(itertools.islice(RenderedTiles(64, first=10_000_000), 20))
    with torch.inference_mode():
        results = [measures(batch) for batch in unseen]
    print("vit:", {name: round(float(torch.stack([r[name] for r in results]).mean()), 3) for name in results[0]})
    encoder.vision_model.to(torch.float16).save_pretrained(out / "tiny-vit")
    size = {"shortest_edge": TILE}
    CLIPImageProcessor(size=size, crop_size=TILE, image_mean=MEAN, image_std=STD).save_pretrained(out / "tiny-vit")


def blank_counts_less(classes: int) -> Tensor:
    """Return class weights: most patches show nothing, which is learned quickly."""
    weight = torch.ones(classes)
    weight[0] = 0.1
    return weight


def recall(logits: Tensor, wanted: Tensor) -> Tensor:
    """Return the share of non-empty labels that are predicted correctly."""
    there = wanted > 0
    return (logits.argmax(-1)[there] == wanted[there]).float().mean()


def fit(
    model: nn.Module,
    measures: Callable[[Any], dict[str, Tensor]],
    batches: Iterable[Any],
    steps: int,
    peak_rate: float,
) -> None:
    """Train with AdamW, warm-up and a cosine schedule; print the measures every 100 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_rate, betas=(0.9, 0.98), weight_decay=0.01)
    started = time.monotonic()
    for step, batch in enumerate(itertools.islice(batches, steps)):
        for group in optimizer.param_groups:
            cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))
            group["lr"] = peak_rate * min((step + 1) / 200, 1) * cosine
        numbers = measures(batch)
        numbers["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            text = " ".join(f"{name} {number.item():.3f}" for name, number in numbers.items())
            print(f"{(time.monotonic() - started) / 60:6.1f} min  step {step:6d}  {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["tokenizer", "lm", "vit"])
    parser.add_argument("out", type=Path, help="output folder of tiny-lm/ and tiny-vit/")
    parser.add_argument("--steps", type=int, help="optimizer steps; default 4000 for lm, 3600 for vit")
    arguments = parser.parse_args()
    if arguments.part == "tokenizer":
        train_tokenizer(arguments.out, texts=20_000)
    elif arguments.part == "lm":
        train_lm(arguments.out, arguments.steps or 4000)
    else:
        train_vit(arguments.out, arguments.steps or 3600)


if __name__ == "__main__":
    main()
