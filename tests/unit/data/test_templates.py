"""Every template writes the published format, as training text and through Jinja."""

from __future__ import annotations

import random
import re
from copy import deepcopy

import pytest
from label_oracle import odd_record, ordinary_record
from tokenizer_kinds import begin_token, exact_tokenizer
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from anyres_vlm.config import TemplateName
from anyres_vlm.data.chat_template import chat_jinja
from anyres_vlm.data.conversation import ConversationTokenizer
from anyres_vlm.data.index.rows import IndexSettings
from anyres_vlm.data.templates import TEMPLATES
from anyres_vlm.errors import DataError
from anyres_vlm.geometry import Tiling
from anyres_vlm.schema import IGNORE_INDEX, Record, Turn

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAVA = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
DIALOGUE = (Turn("user", "<image>\nQ1"), Turn("assistant", "A1"), Turn("user", "Q2"), Turn("assistant", "A2"))


# The dialogue as the published code builds its ids: control tokens by name, and text tokenised piece by piece.
# `added` is the begin token of a tokenizer that adds one, `<s>` one that the format itself has.
IDS: dict[TemplateName, list[str]] = {
    "plain": ["added", "<image>", "A1", "</s>", "A2", "</s>"],
    "tiny": ["added", "User: ", "<image>", "\nQ1 Assistant: A1", "</s>", "User: Q2 Assistant: A2", "</s>"],
    "vicuna_v1": [
        *("added", f"{VICUNA} USER: ", "<image>", "\nQ1 ASSISTANT: A1", "</s>"),
        *("USER: Q2 ASSISTANT: A2", "</s>"),
    ],
    "llama_2": [
        *("<s>", f"[INST] <<SYS>>\n{LLAVA}\n<</SYS>>\n\n", "<image>", "\nQ1 [/INST] A1 ", "</s>"),
        *("<s>", "[INST] Q2 [/INST] A2 ", "</s>"),
    ],
    "mistral": ["<s>", "[INST] ", "<image>", "\nQ1 [/INST] A1", "</s>", "[INST] Q2 [/INST] A2", "</s>"],
    "llama_3": [
        *("<s>", "<|start_header_id|>", "system", "<|end_header_id|>", f"\n\n{LLAVA}", "<|eot_id|>"),
        *("<|start_header_id|>", "user", "<|end_header_id|>", "\n\n", "<image>", "\nQ1", "<|eot_id|>"),
        *("<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\nA1", "<|eot_id|>"),
        *("<|start_header_id|>", "user", "<|end_header_id|>", "\n\nQ2", "<|eot_id|>"),
        *("<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\nA2", "<|eot_id|>"),
    ],
    "chatml": [
        *("added", "<|im_start|>", "user\n", "<image>", "\nQ1", "<|im_end|>", "\n"),
        *("<|im_start|>", "assistant\nA1", "<|im_end|>", "\n", "<|im_start|>", "user\nQ2", "<|im_end|>", "\n"),
        *("<|im_start|>", "assistant\nA2", "<|im_end|>", "\n"),
    ],
    "chatml_direct": [
        *("added", "<|im_start|>", "system\nAnswer the questions.", "<|im_end|>"),
        *("<|im_start|>", "user\n", "<image>", "\nQ1", "<|im_end|>", "<|im_start|>", "assistant\nA1", "<|im_end|>"),
        *("<|im_start|>", "user\nQ2", "<|im_end|>", "<|im_start|>", "assistant\nA2", "<|im_end|>"),
    ],
}


def adding(kind: str, adds: bool) -> PreTrainedTokenizerFast:
    """A tokenizer whose post-processor adds the begin token, or does not."""
    tokenizer = deepcopy(exact_tokenizer(kind))
    bytes_alone = processors.Sequence([processors.ByteLevel(trim_offsets=False)])
    tokenizer.backend_tokenizer.post_processor = begin_token() if adds else bytes_alone
    assert (tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id) == adds
    return tokenizer


def by_hand(template: TemplateName, tokenizer: PreTrainedTokenizerFast, adds: bool) -> list[int]:
    """The ids of the dialogue, put together from `IDS`."""
    ids: list[int] = []
    for piece in IDS[template]:
        if piece == "added":
            ids += [tokenizer.bos_token_id] * adds
        elif piece in tokenizer.all_special_tokens:
            ids.append(tokenizer.convert_tokens_to_ids(piece))
        else:
            ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_published_format(template: TemplateName) -> None:
    text, spans = ConversationTokenizer(template, exact_tokenizer("llama_legacy")).render(DIALOGUE)
    assert text == "".join(IDS[template][1:] if IDS[template][0] in ("added", "<s>") else IDS[template])
    assert [re.sub(r"<\|\w+\|>|</s>", "", text[first:end]).strip() for first, end in spans] == ["A1", "A2"]
    assert all(text[first:end].endswith(("</s>", "<|im_end|>", "<|eot_id|>")) for first, end in spans)


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("kind", ["llama_legacy", "unigram_legacy", "llama3", "qwen"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_published_ids(template: TemplateName, kind: str, adds: bool) -> None:
    tokenizer = adding(kind, adds)
    encoder = ConversationTokenizer(template, tokenizer)
    (result,) = encoder.encode([Record("r", (), DIALOGUE)])
    assert not isinstance(result, DataError), result
    ids = result[0].tolist()
    expected = by_hand(template, tokenizer, adds)
    assert ids == expected
    assert ids.count(tokenizer.bos_token_id) == IDS[template].count("<s>") + (IDS[template][0] == "added" and adds)
    answers = tokenizer.convert_ids_to_tokens(ids[at] for at in (result[1] != IGNORE_INDEX).nonzero()[0])
    assert "".join(answers).replace("▁", "").replace("Ġ", "") == f"A1{encoder.end}A2{encoder.end}".replace(" ", "")
    prompt = encoder.prompt(DIALOGUE[:3]).tolist()
    assert prompt == ids[: len(prompt)]
    if template != "plain":  # the checkpoint is served with the ids that it was trained with
        said = [{"role": turn.role, "content": turn.text} for turn in DIALOGUE]
        text = tokenizer.apply_chat_template(said, chat_template=chat_jinja(template, tokenizer), tokenize=False)
        assert tokenizer(text, add_special_tokens=not text.startswith("<s>"))["input_ids"] == expected


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "llama_2"])
def test_a_tokenizer_without_a_begin_token(template: TemplateName) -> None:
    tokenizer = adding("qwen", adds=False)
    expected = [token for token in by_hand(template, tokenizer, False) if token != tokenizer.bos_token_id]
    tokenizer.bos_token = None
    (result,) = ConversationTokenizer(template, tokenizer).encode([Record("r", (), DIALOGUE)])
    assert not isinstance(result, DataError), result
    assert result[0].tolist() == expected
    assert "bos_token" not in chat_jinja(template, tokenizer)


def test_the_begin_token_shows_in_the_index() -> None:
    """An index of ids without the begin token is built again; that of a tokenizer which adds it is kept."""
    for template, changes in (("llama_3", True), ("mistral", True), ("llama_2", True), ("vicuna_v1", False)):
        texts = []
        for adds in (True, False):
            encoder = ConversationTokenizer(template, adding("llama3", adds))  # type: ignore[arg-type]
            texts.append(IndexSettings(encoder, Tiling(), 2048).words["dialogue"][0])
        assert not texts[0].startswith("<s>")
        assert texts[1] == ("<s>" + texts[0] if changes else texts[0])


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "plain"])
def test_jinja_renders_the_training_text(template: TemplateName) -> None:
    tokenizer = exact_tokenizer("llama3")
    encoder = ConversationTokenizer(template, tokenizer)
    jinja = TEMPLATES[template].jinja
    rng = random.Random(template)
    for record in [
        *(ordinary_record(rng, "", images) for images in range(3)),
        *(odd_record(rng, "") for _ in range(9)),
    ]:
        turns = record.turns
        as_text = [{"role": turn.role, "content": turn.text} for turn in turns]
        assert tokenizer.apply_chat_template(as_text, chat_template=jinja, tokenize=False) == encoder.render(turns)[0]
        asked = tokenizer.apply_chat_template(
            as_text[:-1], chat_template=jinja, tokenize=False, add_generation_prompt=True
        )
        assert asked == encoder.render(turns[:-1], prompt=True)[0]


@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "plain"])
def test_jinja_takes_images_as_parts(template: TemplateName, images: int) -> None:
    tokenizer = exact_tokenizer("llama3")
    parts = [{"type": "image"}] * images + [{"type": "text", "text": "what is this?"}]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}],
        chat_template=TEMPLATES[template].jinja,
        tokenize=False,
        add_generation_prompt=True,
    )
    question = Turn("user", "<image>\n" * images + "what is this?")
    assert prompt == ConversationTokenizer(template, tokenizer).render([question], prompt=True)[0]
