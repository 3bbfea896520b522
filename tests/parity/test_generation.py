"""Greedy text of a batch equals that of each conversation alone and that of stock LlavaNext's `generate`."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from anyres_vlm.checkpoints.bases import build_model
from anyres_vlm.checkpoints.load_save import load_pretrained, save_pretrained
from anyres_vlm.config import ModelConfig
from anyres_vlm.data.templates import TEMPLATES
from anyres_vlm.inference.assistant import Assistant, Conversation
from anyres_vlm.inference.generation import Decoding
from anyres_vlm.model import kv_cache
from anyres_vlm.schema import Turn

END = 2
SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "pad_token_id": 3,
    "initializer_range": 0.2,  # large enough that attention differs between positions
}
FAMILIES = {
    "llama": lambda shape: LlamaConfig(**shape),
    "mistral": lambda shape: MistralConfig(**shape, sliding_window=None),
    "qwen2": lambda shape: Qwen2Config(**shape),
    "gemma": lambda shape: GemmaConfig(**shape, head_dim=16),
}
QUESTIONS = [  # sizes as (width, height)
    ("<image>\nWhat?", [(60, 40)]),
    ("Only words", []),
    ("<image>\n<image>\nWhich of both is red?", [(20, 20), (300, 7)]),
    ("<image>", [(7, 300)]),
    ("a", []),
    ("<image>\nWhere is the star? " * 30, [(61, 33)] * 30),  # far longer than the others
    ("<image>\n<image>\n<image>\nWhat do you see?", [(1, 1), (33, 61), (90, 90)]),
]


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * 1000 + height).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


CONVERSATIONS = [
    Conversation([Turn("user", words.strip())], [picture(*size) for size in sizes]) for words, sizes in QUESTIONS
]


@pytest.fixture(scope="module", params=list(FAMILIES))
def saved(
    request: pytest.FixtureRequest,
    tiny_bases: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        config = FAMILIES[request.param](SHAPE | {"vocab_size": len(tiny_tokenizer), "eos_token_id": END})
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    bases = {"llm": str(folder), "encoder": {"name": str(tiny_bases / "vit")}, "template": "tiny"}
    model, tokenizer = build_model(ModelConfig.model_validate(bases), seed=1)
    save_pretrained(model, model.state_dict(), tokenizer, TEMPLATES["tiny"].jinja, folder)
    return folder


def stock_answers(folder: Path, assistant: Assistant, new_tokens: int) -> list[list[int]]:
    """Generate for each conversation alone, without the end token."""
    stock = LlavaNextForConditionalGeneration.from_pretrained(folder).eval()
    processor = LlavaNextProcessor.from_pretrained(folder)
    answers = []
    for conversation in CONVERSATIONS:
        text = assistant.conversation.render(conversation.turns, prompt=True)[0]
        inputs = processor(images=list(conversation.images) or None, text=text, return_tensors="pt")
        new = stock.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        answers.append([token for token in new.tolist() if token != END])
    return answers


def batch_answers(assistant: Assistant, conversations: list[Conversation], decoding: Decoding) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in conversations]
    prompts = [assistant.prompt(conversation, number) for number, conversation in enumerate(conversations)]
    for place, token in assistant.tokens(prompts, decoding):
        answers[place].append(token)
    return answers


def test_batch_alone_and_stock_agree(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "ROOM", 5)  # so that the cache grows several times
    assistant = Assistant(*load_pretrained(saved))
    decoding = Decoding(max_new_tokens=24)
    expected = stock_answers(saved, assistant, 24)
    assert batch_answers(assistant, CONVERSATIONS, decoding) == expected
    assert batch_answers(assistant, CONVERSATIONS[::-1], decoding) == expected[::-1]
    assert [batch_answers(assistant, [one], decoding)[0] for one in CONVERSATIONS] == expected
    assert len({tuple(tokens) for tokens in expected}) > 3, "the conversations tell apart"


def test_answers_that_end_early_do_not_change_the_others(saved: Path) -> None:
    """One token of each long answer becomes an end token, so the answers end at different steps."""
    assistant = Assistant(*load_pretrained(saved))
    longest = batch_answers(assistant, CONVERSATIONS, Decoding(40))
    ends = {tokens[place] for tokens, place in zip(longest, (2, 30, 7, 11, 3, 0, 19), strict=True) if len(tokens) > 30}
    assistant.model.language_model.generation_config.eos_token_id = [END, *ends]

    def cut(tokens: list[int]) -> list[int]:
        return tokens[: next((place for place, token in enumerate(tokens) if token in ends), len(tokens))]

    expected = [cut(tokens) for tokens in longest]
    assert len({len(tokens) for tokens in expected}) > 2
    assert batch_answers(assistant, CONVERSATIONS, Decoding(40)) == expected


def test_answers_end_where_the_model_ends(saved: Path) -> None:
    assistant = Assistant(*load_pretrained(saved))
    lengths = sorted({len(assistant.prompt(one).ids) for one in CONVERSATIONS})
    assert any(later > 4 * earlier for earlier, later in pairwise(lengths))
    config = assistant.model.language_model.config
    config.max_position_embeddings = lengths[-1] + 3
    assistant.model.language_model.generation_config.eos_token_id = None
    counts = [len(tokens) for tokens in batch_answers(assistant, CONVERSATIONS, Decoding(10))]
    assert counts == [3 if len(assistant.prompt(one).ids) == lengths[-1] else 10 for one in CONVERSATIONS]
