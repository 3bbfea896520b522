"""A saved folder in stock's hands: ids, tiles and sizes of its processor, logits of padded batches of every kind."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_stock import picture
from transformers import AutoProcessor, LlavaNextForConditionalGeneration

from anyres_vlm.checkpoints.bases import build_model
from anyres_vlm.checkpoints.load_save import load_pretrained, save_pretrained
from anyres_vlm.config import EncoderConfig, ModelConfig
from anyres_vlm.data.conversation import ConversationTokenizer
from anyres_vlm.data.templates import TEMPLATES
from anyres_vlm.data.tiling import cut_tiles
from anyres_vlm.geometry import Size, plan_tiles
from anyres_vlm.schema import Turn, token_repeats

PIXELS_ATOL = 1e-6  # of normalised values, into whose mean and deviation stock folds 255; worst seen: 3e-7
LOGITS_ATOL = 1e-4  # worst of these batches in fp32 on CPU: 3e-5, as a padded batch adds up in another order


@pytest.fixture(scope="module")
def saved(tiny_bases, tmp_path_factory) -> Path:
    config = ModelConfig(
        llm=str(tiny_bases / "llm"),
        encoder=EncoderConfig(name=str(tiny_bases / "vit")),
        template="vicuna_v1",
        grid="3x3",
    )
    model, tokenizer = build_model(config, seed=1)
    folder = tmp_path_factory.mktemp("saved")
    save_pretrained(model, model.state_dict(), tokenizer, TEMPLATES["vicuna_v1"].jinja, folder)
    return folder


@pytest.fixture(scope="module")
def ours(saved):
    return load_pretrained(saved)


def random_sizes(seed: int, count: int) -> list[tuple[int, int]]:
    """Widths and heights of every shape: slivers, small ones and large ones, uniform in the logarithm."""
    rng = random.Random(seed)
    return [(round(2 ** rng.uniform(0, 9)), round(2 ** rng.uniform(0, 9))) for _ in range(count)]


def prepared(ours, sizes):
    """Our ids (1, L), uint8 tiles and plans of one question about images of these sizes."""
    model, tokenizer = ours
    plans = [plan_tiles(Size(height=height, width=width), model.tiling) for width, height in sizes]
    turns = [Turn("user", "<image>" * len(sizes) + "\nis it a star?")]
    ids = ConversationTokenizer("vicuna_v1", tokenizer).prompt(turns)
    ids = np.repeat(ids, token_repeats(ids, plans, model.image_token_id)).astype(np.int64)
    tiles = [np.zeros((0, 3, 28, 28), np.uint8)]
    tiles += [cut_tiles(picture(width, height), plan) for (width, height), plan in zip(sizes, plans, strict=True)]
    return torch.from_numpy(ids)[None], torch.from_numpy(np.concatenate(tiles)), plans


def logits(ours, sizes) -> torch.Tensor:
    model, _ = ours
    ids, tiles, plans = prepared(ours, sizes)
    with torch.inference_mode():
        found: torch.Tensor = model.language_model(inputs_embeds=model.embed(ids, tiles, plans)).logits[0]
    return found


def stock_prompt(processor, images: int) -> str:
    content = [{"type": "text", "text": "<image>" * images + "\nis it a star?"}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def test_ids_tiles_and_sizes_of_images_of_every_shape(saved, ours) -> None:
    processor, (model, _) = AutoProcessor.from_pretrained(saved), ours
    for sizes in ([size] for size in random_sizes(seed=0, count=120)):
        ids, tiles, plans = prepared(ours, sizes)
        images = [picture(*size) for size in sizes]
        inputs = processor(images=images, text=stock_prompt(processor, 1), return_tensors="pt")
        assert torch.equal(inputs["input_ids"], ids), sizes
        assert inputs["image_sizes"].tolist() == [[plan.image.height, plan.image.width] for plan in plans]
        values = inputs["pixel_values"][0]
        tower = model.vision_tower
        torch.testing.assert_close(tower.normalise(tiles), values, atol=PIXELS_ATOL, rtol=0)
        assert torch.equal(((values * tower.std + tower.mean) * 255).round().to(torch.uint8), tiles), sizes


def test_padded_batches_of_every_kind_give_the_logits_of_each_alone(saved, ours) -> None:
    """One image, several, none: stock takes them in one batch, right-padded; we take them one by one."""
    processor = AutoProcessor.from_pretrained(saved)
    stock, outcome = LlavaNextForConditionalGeneration.from_pretrained(saved, output_loading_info=True)
    assert not any(outcome[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for seed in range(4):
        sizes = random_sizes(seed=10 + seed, count=7)
        questions = [sizes[:1], sizes[1:3], [], sizes[3:6], sizes[6:]]
        inputs = processor(
            images=[picture(*size) for question in questions for size in question],
            text=[stock_prompt(processor, len(question)) for question in questions],
            return_tensors="pt",
            padding=True,
            padding_side="right",
        )
        with torch.inference_mode():
            batch = stock.eval()(**inputs).logits
        for row, mask, question in zip(batch, inputs["attention_mask"], questions, strict=True):
            expected = row[mask.bool()]
            torch.testing.assert_close(logits(ours, question), expected, atol=LOGITS_ATOL, rtol=0)
