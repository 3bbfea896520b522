"""Counts in the index compared with what the model receives and with transformers' own count."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import LlavaNextImageProcessorPil, PreTrainedTokenizerFast
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

from anyres_vlm.data.conversation import ConversationTokenizer
from anyres_vlm.data.index.build import build_index
from anyres_vlm.data.index.rows import IndexSettings
from anyres_vlm.data.loader import IndexedSamples, collate, load
from anyres_vlm.data.sources import open_source
from anyres_vlm.geometry import Dialect, Grid, Layout, Size, Tiling
from anyres_vlm.model.connector import merge_tiles
from anyres_vlm.schema import IGNORE_INDEX

IMAGES = 2000
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
SQUARE, WIDE, TALL = (1, 1), (400, 3), (3, 400)
EDGES = [SQUARE, WIDE, TALL, (28, 28), (56, 28), (28, 56), (56, 56), (84, 28), (57, 55), (27, 29)]


def shapes(rng: random.Random) -> list[tuple[int, int]]:
    """Return image widths and heights: tile edges, long strips, and random sizes."""
    made = list(EDGES)
    while len(made) < IMAGES:
        ratio, side = rng.lognormvariate(0, 0.8), rng.choice((8, 30, 60, 120)) * rng.uniform(0.5, 1.5)
        made.append((max(1, int(side * ratio**0.5)), max(1, int(side / ratio**0.5))))
    return made


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Size]]]:
    """Write LLaVA JSON of records with 0 to 3 images. Returns it with the sizes as Pillow reads them."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(7)
    names, shown = [], {}
    for number, (width, height) in enumerate(shapes(rng)):
        image_format = FORMATS[number % len(FORMATS)]
        image = Image.new("RGB", (width, height), (number % 251, 90, 30))
        exif = Image.Exif()
        exif[0x0112] = rng.randint(1, 8)
        names.append(f"{number}.{image_format.lower()}")
        options = {"exif": exif} if image_format in ("JPEG", "PNG", "WEBP", "TIFF") else {}
        image.save(folder / names[-1], format=image_format, **options)
        with Image.open(folder / names[-1]) as again:
            upright = ImageOps.exif_transpose(again)
        shown[names[-1]] = Size(height=upright.height, width=upright.width)
    entries, sizes = [], {}
    while names:
        mine = [names.pop() for _ in range(min(rng.randint(0, 3), len(names)))]
        sizes[str(len(entries))] = [shown[name] for name in mine]
        turns = []
        for turn in range(rng.randint(1, 3)):
            opening = "<image> and " * len(mine) if turn == 0 else ""
            turns.append({"from": "human", "value": opening + "what? " * rng.randint(1, 9)})
            turns.append({"from": "gpt", "value": "a star " * rng.randint(1, 20)})
        entries.append({"id": str(len(entries)), "image": mine, "conversations": turns})
    (folder / "data.json").write_text(json.dumps(entries))
    return folder / "data.json", sizes


@pytest.mark.parametrize("layout", ["spatial_unpad", "flat"])
@pytest.mark.parametrize("dialect", ["hf", "llava"])
def test_counts_equal_the_input_of_the_model(
    corpus: tuple[Path, dict[str, list[Size]]],
    tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    dialect: Dialect,
    layout: Layout,
) -> None:
    data, shown = corpus
    tiling = Tiling.from_grid(Grid(2, 2), tile=28, patch=14, dialect=dialect, layout=layout)
    settings = IndexSettings(ConversationTokenizer("vicuna_v1", tiny_tokenizer), tiling, max_length=4096)
    index = build_index(data, None, settings, tmp_path / "index.parquet", workers=1, max_bad_fraction=0.0).index
    assert index.ok.all()
    samples = IndexedSamples(open_source(data), index, settings.conversation, tiling)
    image_token_id = tiny_tokenizer.convert_tokens_to_ids("<image>")
    visual, newline, text = (index.numbers(f"{part}_tokens") for part in ("visual", "newline", "text"))
    marker = torch.full((1,), -1.0)
    for place in range(len(index)):
        sample = samples.sample(place)
        batch = collate([load(sample, "fast")], tiling.tile, image_token_id)
        ids, labels = batch.input_ids[0], batch.labels[0]
        assert index.id(place) == sample.id
        assert index.tokens[place] == len(ids) == visual[place] + newline[place] + text[place]
        assert index.tiles[place] == len(batch.tiles)
        assert index.supervised[place] == int((labels[1:] != IGNORE_INDEX).sum())
        assert list(index.sizes(place)) == shown[sample.id]
        assert text[place] == int((ids != image_token_id).sum())
        if sample.plans:  # what the model lays into the image tokens' places
            merged = merge_tiles(torch.zeros(len(batch.tiles), tiling.patches, 1), batch.plans, marker)
            assert len(merged) == int((ids == image_token_id).sum())
            assert newline[place] == int((merged == marker).sum())
    assert int(index.tiles.sum()) > IMAGES * 2
    assert len(np.unique(index.tokens)) > 50


def test_visual_tokens_equal_transformers_own_count(
    corpus: tuple[Path, dict[str, list[Size]]], tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    data, shown = corpus
    tiling = Tiling.from_grid(Grid(3, 2), tile=28, patch=14)
    settings = IndexSettings(ConversationTokenizer("vicuna_v1", tiny_tokenizer), tiling, max_length=4096)
    index = build_index(data, None, settings, tmp_path / "index.parquet", workers=1, max_bad_fraction=0.0).index
    stock = object.__new__(LlavaNextProcessor)
    stock.image_processor = LlavaNextImageProcessorPil(image_grid_pinpoints=[list(pair) for pair in tiling.pinpoints])
    stock.patch_size, stock.num_additional_image_tokens = tiling.patch, 0
    visual = index.numbers("visual_tokens") + index.numbers("newline_tokens")
    for place in range(len(index)):
        sizes = shown[index.id(place)]
        expected = [stock._get_number_of_features(size.height, size.width, tiling.tile, tiling.tile) for size in sizes]
        assert visual[place] == sum(expected)
