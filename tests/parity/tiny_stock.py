"""Tiny random LlavaNext folders, made and saved by stock transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)

PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
TEXT = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "initializer_range": 0.2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
JINJA = (
    "{% for message in messages %}{{ '[' + message.role + ']\\n' + message.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\\n' }}{% endif %}"
)


def random_stock(vocabulary: int, seed: int = 0, **changes: object) -> LlavaNextForConditionalGeneration:
    """A random model; `changes` go to its configuration."""
    torch.manual_seed(seed)
    tied = bool(changes.get("tie_word_embeddings"))
    settings = {
        "vision_config": CLIPVisionConfig(**VISION, initializer_range=0.1),
        "text_config": LlamaConfig(**TEXT, vocab_size=vocabulary, tie_word_embeddings=tied),
        "image_grid_pinpoints": PINPOINTS,
        "image_token_index": 4,
        "image_seq_length": 4,
    }
    model = LlavaNextForConditionalGeneration(LlavaNextConfig(**settings | changes)).eval()
    for parameter in model.model.multi_modal_projector.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def save_processor(folder: Path, tokenizer: PreTrainedTokenizerFast, jinja: str | None, **changes: object) -> None:
    """Its processor, with the tokenizer; `changes` go to the image processor."""
    settings = {
        "size": {"shortest_edge": 28},
        "crop_size": {"height": 28, "width": 28},
        "image_grid_pinpoints": PINPOINTS,
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.2, 0.3, 0.4],
    }
    LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(**settings | changes),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=jinja,
    ).save_pretrained(folder)


def picture(width: int, height: int) -> Image.Image:
    """Noise of a size."""
    pixels = np.random.default_rng(width * 1000 + height).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
