"""A saved folder is a stock LlavaNext checkpoint: stock transformers is the oracle for ids, tiles, logits and text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor, PreTrainedTokenizerFast

from anyres_vlm.checkpoints.bases import build_model
from anyres_vlm.checkpoints.load_save import load_pretrained, save_pretrained
from anyres_vlm.config import EncoderConfig, ModelConfig
from anyres_vlm.geometry import Size, plan_tiles
from anyres_vlm.inference.generation import Decoding, stream_tokens
from anyres_vlm.model.vlm import VisionLanguageModel

LOGITS_ATOL = 2e-5  # worst seen over these shapes in fp32 on CPU: 3e-6
SIZES = [
    (56, 28),
    (28, 56),
    (56, 56),
    (84, 28),
    (28, 84),
    (20, 20),
    (61, 33),
    (33, 61),
    (300, 7),
    (7, 300),
    (1, 1),
]


@pytest.fixture(scope="module")
def saved(tiny_bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = ModelConfig(
        llm=str(tiny_bases / "llm"),
        encoder=EncoderConfig(name=str(tiny_bases / "vit")),
        template="vicuna_v1",
    )
    model, tokenizer = build_model(config, seed=1)
    folder = tmp_path_factory.mktemp("saved")
    save_pretrained(model, model.state_dict(), tokenizer, "{{ messages }}", folder)
    return folder


@pytest.fixture(scope="module")
def ours(saved: Path) -> tuple[VisionLanguageModel, PreTrainedTokenizerFast]:
    return load_pretrained(saved)


@pytest.fixture(scope="module")
def stock(saved: Path) -> LlavaNextForConditionalGeneration:
    model, outcome = LlavaNextForConditionalGeneration.from_pretrained(saved, output_loading_info=True)
    assert not outcome["missing_keys"]
    assert not outcome["unexpected_keys"]
    assert not outcome["mismatched_keys"]
    return model.eval()


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * 1000 + height).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def prepared(
    model: VisionLanguageModel, processor: LlavaNextProcessor, images: list[Image.Image], text: str
) -> tuple[dict[str, torch.Tensor], torch.Tensor, list]:
    """Stock's inputs, and the same images as uint8 tiles with their plans."""
    inputs = processor(images=images, text=text, return_tensors="pt")
    plans = [plan_tiles(Size(height=i.height, width=i.width), model.tiling) for i in images]
    tower = model.vision_tower
    pixels = [values[: plan.num_tiles] for values, plan in zip(inputs["pixel_values"], plans, strict=True)]
    tiles = ((torch.cat(pixels) * tower.std + tower.mean) * 255).round().to(torch.uint8)
    return inputs, tiles, plans


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_logits_and_greedy_text_equal_stock(saved, ours, stock, width, height) -> None:
    model, _ = ours
    processor = LlavaNextProcessor.from_pretrained(saved)
    inputs, tiles, plans = prepared(model, processor, [picture(width, height)], "USER: <image>\nWhat? ASSISTANT:")
    with torch.inference_mode():
        embedded = model.embed(inputs["input_ids"], tiles, plans)
        logits = model.language_model(inputs_embeds=embedded).logits
        expected = stock(**inputs).logits
    torch.testing.assert_close(logits, expected, atol=LOGITS_ATOL, rtol=0)
    greedy = stock.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    prompt = inputs["input_ids"]
    ids = [
        token for _, token in stream_tokens(model, prompt, [prompt.shape[1]], tiles, plans, Decoding(max_new_tokens=8))
    ]
    assert ids == [token for token in greedy.tolist() if token != 2]


def test_several_images_and_text_alone(saved, ours, stock) -> None:
    model, _ = ours
    processor = LlavaNextProcessor.from_pretrained(saved)
    images = [picture(50, 40), picture(30, 90)]
    inputs, tiles, plans = prepared(model, processor, images, "USER: <image> and <image>? ASSISTANT:")
    with torch.inference_mode():
        logits = model.language_model(inputs_embeds=model.embed(inputs["input_ids"], tiles, plans)).logits
        torch.testing.assert_close(logits, stock(**inputs).logits, atol=LOGITS_ATOL, rtol=0)
        words = processor(text="USER: Hello ASSISTANT:", return_tensors="pt")
        blank = torch.zeros((0, 3, 28, 28), dtype=torch.uint8)
        logits = model.language_model(inputs_embeds=model.embed(words["input_ids"], blank, [])).logits
        torch.testing.assert_close(logits, stock(**words).logits, atol=LOGITS_ATOL, rtol=0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"projector": "linear"}, "linear projector"),
        ({"layout": "flat"}, "flat layout"),
        ({"grid": "1x1"}, "only the thumbnail"),
    ],
)
def test_what_stock_cannot_express_is_ours_and_loads_back(tiny_bases, tmp_path, change, reason) -> None:
    from anyres_vlm.checkpoints.stock import stock_obstacle

    base = {
        "llm": str(tiny_bases / "llm"),
        "encoder": {"name": str(tiny_bases / "vit")},
        "template": "vicuna_v1",
    }
    model, tokenizer = build_model(ModelConfig.model_validate(base | change), seed=2)
    assert reason in (stock_obstacle(model) or "")
    save_pretrained(model, model.state_dict(), tokenizer, "{{ messages }}", tmp_path)
    again, _ = load_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert '"model_type": "anyres_vlm"' in (tmp_path / "config.json").read_text()
