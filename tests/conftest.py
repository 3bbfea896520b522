"""Tiny random base models that every test module may build on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from anyres_vlm.checkpoints.bases import build_model
from anyres_vlm.checkpoints.load_save import save_pretrained
from anyres_vlm.config import ModelConfig, TemplateName
from anyres_vlm.data.conversation import ConversationTokenizer
from anyres_vlm.data.headers import plan_image
from anyres_vlm.data.loader import Loaded, load
from anyres_vlm.data.templates import TEMPLATES
from anyres_vlm.errors import DataError
from anyres_vlm.geometry import Tiling
from anyres_vlm.schema import Record, Sample

CORPUS = [
    "USER: What colour is the star? ASSISTANT: The star is red.",
    "a blue circle at the top left of a white page",
    "the total on the receipt is 12.50 and the sign says BAKERY",
]


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 300 tokens with `</s>` and `<image>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def tiny_bases(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with a random CLIP encoder in `vit` (tile 28, patch 14) and a random Llama in `llm`."""
    folder = tmp_path_factory.mktemp("bases")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vision = CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        )
        CLIPVisionModel(vision).save_pretrained(folder / "vit")
        text = LlamaConfig(
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=len(tiny_tokenizer),
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=3,
            initializer_range=0.2,  # large enough that attention differs between positions
        )
        LlamaForCausalLM(text).save_pretrained(folder / "llm")
    tiny_tokenizer.save_pretrained(folder / "llm")
    return folder


@pytest.fixture(scope="session")
def checkpoint(tiny_bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both bases, as training saves it."""
    bases = {"llm": str(tiny_bases / "llm"), "encoder": {"name": str(tiny_bases / "vit")}, "template": "tiny"}
    model, tokenizer = build_model(ModelConfig.model_validate(bases), seed=0)
    folder = tmp_path_factory.mktemp("checkpoint")
    save_pretrained(model, model.state_dict(), tokenizer, TEMPLATES["tiny"].jinja, folder)
    return folder


@pytest.fixture(scope="session")
def load_records() -> Callable[[list[Record], TemplateName, PreTrainedTokenizerFast, Tiling], list[Loaded]]:
    """Records in memory as samples with their tiles, as a pack takes them."""

    def load_all(
        records: list[Record], template: TemplateName, tokenizer: PreTrainedTokenizerFast, tiling: Tiling
    ) -> list[Loaded]:
        loaded = []
        for record, encoded in zip(records, ConversationTokenizer(template, tokenizer).encode(records), strict=True):
            assert not isinstance(encoded, DataError)
            plans = tuple(plan_image(image, tiling) for image in record.images)
            loaded.append(load(Sample(record.id, *encoded, record.images, plans), "exact"))
        return loaded

    return load_all
