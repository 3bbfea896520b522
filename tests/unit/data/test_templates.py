"""Every template writes the published format, as training text and through Jinja."""

from __future__ import annotations

import random

import pytest
from label_oracle import odd_record, ordinary_record
from tokenizer_kinds import exact_tokenizer

from anyres_vlm.config import TemplateName
from anyres_vlm.data.conversation import ConversationTokenizer
from anyres_vlm.data.templates import TEMPLATES
from anyres_vlm.schema import Turn

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAVA = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
FORMATS: dict[TemplateName, str] = {
    "plain": "<image>A1</s>A2</s>",
    "tiny": "User: <image>\nQ1 Assistant: A1</s>User: Q2 Assistant: A2</s>",
    "vicuna_v1": f"{VICUNA} USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT: A2</s>",
    "llama_2": (
        f"[INST] <<SYS>>\n{LLAVA}\n<</SYS>>\n\n<image>\nQ1 [/INST] A1 </s><s>[INST] Q2 [/INST] A2 </s>"  # <s> before it
    ),
    "mistral": "[INST] <image>\nQ1 [/INST] A1</s>[INST] Q2 [/INST] A2</s>",
    "llama_3": (
        f"<|start_header_id|>system<|end_header_id|>\n\n{LLAVA}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nQ1<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA1<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nQ2<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA2<|eot_id|>"
    ),
    "chatml": (
        "<|im_start|>user\n<image>\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\nA2<|im_end|>\n"
    ),
    "chatml_direct": (
        "<|im_start|>system\nAnswer the questions.<|im_end|>"
        "<|im_start|>user\n<image>\nQ1<|im_end|><|im_start|>assistant\nA1<|im_end|>"
        "<|im_start|>user\nQ2<|im_end|><|im_start|>assistant\nA2<|im_end|>"
    ),
}
DIALOGUE = (Turn("user", "<image>\nQ1"), Turn("assistant", "A1"), Turn("user", "Q2"), Turn("assistant", "A2"))


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_published_format(template: TemplateName) -> None:
    text, spans = ConversationTokenizer(template, exact_tokenizer("llama_legacy")).render(DIALOGUE)
    assert text == FORMATS[template]
    assert [text[first:end].replace("<|im_end|>", "</s>").replace("<|eot_id|>", "</s>") for first, end in spans] in (
        ["A1</s>", "A2</s>"],
        [" A1</s>", " A2</s>"],
        [" A1 </s>", " A2 </s>"],
    )


def test_llama_2_begins_every_turn_with_its_own_begin_token() -> None:
    tokenizer = exact_tokenizer("llama_legacy")
    ids = ConversationTokenizer("llama_2", tokenizer).prompt(DIALOGUE[:3]).tolist()
    assert ids.count(tokenizer.bos_token_id) == 2
    assert ids[0] == ids[ids.index(tokenizer.eos_token_id) + 1] == tokenizer.bos_token_id


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
