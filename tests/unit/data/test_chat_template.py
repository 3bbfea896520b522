"""The tokenizer's own chat template gives the ids of transformers and exact labels, or a reason why it cannot."""

from __future__ import annotations

import random
from copy import deepcopy
from typing import Any

import pytest
from label_oracle import expected_labels, odd_record, ordinary_record
from tokenizer_kinds import EXACT, byte_level, exact_tokenizer, split_on
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from anyres_vlm.data import chat_template
from anyres_vlm.data.chat_template import chat_jinja
from anyres_vlm.data.conversation import ConversationTokenizer
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.schema import IGNORE_INDEX, Record, Turn

# The shapes of published templates, in the words of this test.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SHAPES = {
    "chatml": CHATML,
    "default_system": (
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}" + CHATML
    ),
    "trims_and_begins": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + "
        "m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "inst": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "other_role": (
        "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + ('model' if m.role == 'assistant' else m.role) + "
        "'\\n' + m.content | trim + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>model\\n' }}{% endif %}"
    ),
    "written_lead": (  # the prompt stops before what every answer begins with
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
        "{% if m.role == 'assistant' %}{{ '<think></think>' }}{% endif %}{{ m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "generation_blocks": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}"
        "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
}


# The traits of templates that released LlavaNext folders have: content as parts, images before the text.
IMAGES_FIRST = "{% for p in m.content | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
TEXT = "{% for p in m.content if p['type'] == 'text' %}"
PARTS = {
    "vicuna": (  # a space after every text, no end token
        "{% for m in messages %}{% if m.role != 'system' %}{{ m.role.upper() + ': ' }}{% endif %}"
        + IMAGES_FIRST
        + TEXT
        + "{{ p['text'] + ' ' }}{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    "mistral": (  # refuses other roles, reads one text of an answer
        "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' }}"
        + IMAGES_FIRST
        + TEXT
        + "{{ p['text'] }}{% endfor %}{{ ' [/INST]' }}{% elif m.role == 'assistant' %}"
        "{{ ' ' + m.content[0].text + '</s> ' }}{% else %}{{ raise_exception('user and assistant alone') }}{% endif %}"
        "{% endfor %}"
    ),
    "line_before_text": (  # no line end after an image, but one before every text
        "{% for m in messages %}{{ '<|im_start|>' + m.role }}"
        + IMAGES_FIRST.replace("\n", "")
        + TEXT
        + "{{ '\n' + p.text }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
    ),
    "in_order": (  # images where they stand among the texts, with a word around each
        "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for p in m.content %}"
        "{% if p.type == 'image' %}{{ '[IMG]<image>[/IMG]' }}{% else %}{{ p.text }}{% endif %}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "questions_alone": (  # an answer is text
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'user' %}"
        + IMAGES_FIRST
        + "{{ m.content[-1].text }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "no_images": (  # shows none of the images that it gets
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for p in m.content if p.type == 'text' %}"
        "{{ p.text }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}
# A thinking block stands before the last answer and not before earlier ones; `%s` continues the generation prompt.
THINKING = (
    "{%% set at = namespace(question=0) %%}"
    "{%% for m in messages if m.role == 'user' %%}{%% set at.question = loop.index0 * 2 %%}{%% endfor %%}"
    "{%% for m in messages %%}{{ '<|im_start|>' + m.role + '\n' }}"
    "{%% if m.role == 'assistant' and loop.index0 > at.question %%}{{ '<think>\n\n</think>\n\n' }}{%% endif %%}"
    "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}{{ '<|im_end|>\n' }}{%% endfor %%}"
    "{%% if add_generation_prompt %%}{{ '<|im_start|>assistant\n%s' }}{%% endif %%}"
)


def own(template: str | None, kind: str = "qwen") -> ConversationTokenizer:
    tokenizer = exact_tokenizer(kind)
    tokenizer.chat_template = template
    return ConversationTokenizer("chat_template", tokenizer)


def messages(turns: tuple[Turn, ...]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.text} for turn in turns]


@pytest.mark.parametrize("kind", [kind for kind in EXACT if kind not in ("gpt2", "roberta", "no_split")])
@pytest.mark.parametrize("shape", SHAPES)
def test_ids_are_those_of_transformers_and_labels_exact(shape: str, kind: str) -> None:
    encoder = own(SHAPES[shape], kind)
    rng = random.Random(f"{shape}/{kind}")
    records = [ordinary_record(rng, str(n), images=n % 3) for n in range(8)]
    for record, result in zip(records, encoder.encode(records), strict=True):
        assert not isinstance(result, DataError), result
        ids, labels = result
        theirs = encoder.tokenizer.apply_chat_template(messages(record.turns), return_dict=False)
        # What the tokenizer itself puts first, unless the template has: by transformers, its processors add it.
        begin = [] if "bos_token" in SHAPES[shape] else encoder.tokenizer("")["input_ids"]
        assert ids.tolist() == begin + theirs
        assert labels.tolist() == expected_labels(encoder, record.turns)
        prompt = encoder.tokenizer.apply_chat_template(
            messages(record.turns[:-1]), add_generation_prompt=True, return_dict=False
        )
        assert encoder.prompt(record.turns[:-1]).tolist() == begin + prompt == ids[: len(begin + prompt)].tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_odd_text_is_exact_or_refused(shape: str) -> None:
    encoder = own(SHAPES[shape], "qwen")
    rng = random.Random(shape)
    records = [odd_record(rng, str(n)) for n in range(60)]
    exact = 0
    for record, result in zip(records, encoder.encode(records), strict=True):
        if isinstance(result, DataError):
            assert str(result).startswith(f"record {record.id}: ")
            continue
        exact += 1
        assert result[1].tolist() == expected_labels(encoder, record.turns)
        text = encoder.tokenizer.apply_chat_template(messages(record.turns), tokenize=False)
        assert text == encoder.render(record.turns)[0]
        assert all(turn.text in text for turn in record.turns)
    assert exact > 5


def in_parts(turns: tuple[Turn, ...], shape: str) -> list[dict[str, Any]]:
    """The messages that a user of stock transformers writes for these turns, whose images come first."""
    made: list[dict[str, Any]] = []
    for turn in turns:
        text = turn.text if shape == "no_images" else turn.text.replace("<image>\n", "")
        images = [] if shape == "no_images" else [{"type": "image"}] * turn.text.count("<image>")
        whole = turn.role == "assistant" and shape == "questions_alone"
        made.append({"role": turn.role, "content": text if whole else [*images, {"type": "text", "text": text}]})
    return made


@pytest.mark.parametrize("kind", ["llama_legacy", "llama_class", "unigram", "llama3", "qwen", "embedded"])
@pytest.mark.parametrize("shape", PARTS)
def test_content_as_parts(shape: str, kind: str) -> None:
    encoder = own(PARTS[shape], kind)
    rng = random.Random(f"{shape}/{kind}")
    records = [ordinary_record(rng, str(n), images=n % 3) for n in range(8)]
    assert {record.turns[0].text.count("<image>") for record in records} == {0, 1, 2}
    assert max(len(record.turns) for record in records) > 3
    added = "</s>" if shape == "vicuna" else ""
    begin = [] if shape == "in_order" else encoder.tokenizer("")["input_ids"]
    for record, result in zip(records, encoder.encode(records), strict=True):
        assert not isinstance(result, DataError), result
        theirs = encoder.tokenizer.apply_chat_template(in_parts(record.turns, shape), tokenize=False)
        assert encoder.render(record.turns)[0].replace(added or "~", "") == theirs
        if not added:
            assert result[0].tolist() == begin + encoder.tokenizer(theirs, add_special_tokens=False)["input_ids"]
        assert result[1].tolist() == expected_labels(encoder, record.turns)
        assert (result[1] == encoder.end_id).sum() == len(record.turns) // 2
        question = encoder.tokenizer.apply_chat_template(
            in_parts(record.turns[:1], shape), add_generation_prompt=True, return_dict=False
        )
        assert encoder.prompt(record.turns[:1]).tolist() == begin + question


@pytest.mark.parametrize(
    ("shape", "text", "written"),
    [
        ("mistral", "<image>\nwhat?", "[INST] <image>\nwhat? [/INST]"),
        ("mistral", "<image>what?", "[INST] <image>\nwhat? [/INST]"),
        ("mistral", "<image>\n<image>\nwhat?", "[INST] <image>\n<image>\nwhat? [/INST]"),
        ("mistral", "<image>", "[INST] <image>\n [/INST]"),
        ("mistral", "what?\n<image>", "[INST] what?\n<image> [/INST]"),
        ("mistral", "<image>\nis it <image> or <image>?", "[INST] <image>\nis it <image> or <image>? [/INST]"),
        ("line_before_text", "<image>\nwhat?", "<|im_start|>user<image>\nwhat?<|im_end|><|im_start|>assistant"),
        ("line_before_text", "what?", "<|im_start|>user\nwhat?<|im_end|><|im_start|>assistant"),
        (
            "in_order",
            "<image>\nor <image>?",
            "<s><|im_start|>user\n[IMG]<image>[/IMG]or [IMG]<image>[/IMG]?<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
)
def test_where_images_of_parts_stand(shape: str, text: str, written: str) -> None:
    encoder = own(PARTS[shape])
    assert encoder.render([Turn("user", text)], prompt=True)[0] == written
    expected = encoder.tokenizer(written, add_special_tokens=False)["input_ids"]
    assert encoder.prompt([Turn("user", text)]).tolist() == expected


def test_an_end_token_is_added_where_the_template_has_none(caplog: pytest.LogCaptureFixture) -> None:
    chat_template.warn_of_added_end.cache_clear()
    encoder = own(PARTS["vicuna"])
    turns = (Turn("user", "<image>\na"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d"))
    assert encoder.render(turns)[0] == "USER: <image>\na ASSISTANT: b</s> USER: c ASSISTANT: d</s> "
    assert encoder.render(turns[:3], prompt=True)[0] == "USER: <image>\na ASSISTANT: b</s> USER: c ASSISTANT:"
    assert "the tokenizer's '</s>' follows each answer, in training and in prompts" in caplog.text
    tokenizer = deepcopy(encoder.tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(UsageError, match="writes no end token after an answer"):
        _ = ConversationTokenizer("chat_template", tokenizer).end_id


def test_thinking_blocks_before_the_last_answer_alone() -> None:
    """The text is transformers' and every answer follows the prompt that generation sees; the block is generated."""
    encoder = own(THINKING % "")
    turns = tuple(Turn(*said) for said in [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")])
    ((ids, labels),) = encoder.encode([Record("r", (), turns)])
    assert ids.tolist() == encoder.tokenizer.apply_chat_template(messages(turns), return_dict=False)
    text = encoder.tokenizer.decode(labels[labels != IGNORE_INDEX])
    assert text == "b<|im_end|><think>\n\n</think>\n\nd<|im_end|>"
    for position in (1, 3):
        prompt = encoder.prompt(turns[:position]).tolist()
        assert prompt == ids[: len(prompt)].tolist()
        assert (labels[: len(prompt)] == IGNORE_INDEX).all() or position == 3
        assert labels[len(prompt)] != IGNORE_INDEX
        theirs = encoder.tokenizer.apply_chat_template(
            messages(turns[:position]), add_generation_prompt=True, return_dict=False
        )
        assert prompt == theirs
    assert encoder.lead == "<think>\n\n</think>\n\n"
    (thought,) = encoder.encode([Record("r7", (), (turns[0], Turn("assistant", "<think>hm</think>d")))])
    assert str(thought) == "record r7: this llm's chat template changes the turns' text: use another template"


def test_thinking_blocks_of_the_prompt_alone() -> None:
    """Earlier answers stand after another text than their prompt had, so a record may have one answer."""
    encoder = own(THINKING % r"<think>\n\n</think>\n\n")
    turns = tuple(Turn(*said) for said in [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")])
    one, two = encoder.encode([Record("r1", (), turns[:2]), Record("r2", (), turns)])
    assert not isinstance(one, DataError)
    prompt = encoder.tokenizer.apply_chat_template(messages(turns[:1]), add_generation_prompt=True, return_dict=False)
    assert one[0][: len(prompt)].tolist() == prompt
    assert (one[1][: len(prompt)] == IGNORE_INDEX).all()
    assert encoder.tokenizer.decode(one[1][len(prompt) :][:2]) == "b<|im_end|>"
    assert str(two).startswith("record r2: this llm's chat template ends its prompt with '<|im_end|>")
    assert str(two).endswith("only records with one answer can have exact labels: use another template")
    again = encoder.tokenizer.apply_chat_template(messages(turns[:3]), add_generation_prompt=True, return_dict=False)
    assert encoder.prompt(turns[:3]).tolist() == again


def test_several_named_templates() -> None:
    tokenizer = deepcopy(exact_tokenizer("qwen"))
    tokenizer.chat_template = {"default": SHAPES["chatml"], "tools": "{{ 1 }}"}
    assert chat_jinja("chat_template", tokenizer) == SHAPES["chatml"]
    tokenizer.chat_template = {"one": SHAPES["chatml"], "tools": "{{ 1 }}"}
    with pytest.raises(UsageError, match="several chat templates and no default: name another"):
        _ = ConversationTokenizer("chat_template", tokenizer).end_id


def test_labels_are_the_generation_blocks_of_the_template() -> None:
    encoder = own(SHAPES["generation_blocks"], "qwen")
    rng = random.Random(0)
    for n in range(10):
        record = ordinary_record(rng, str(n), images=1)
        ((ids, labels),) = encoder.encode([record])
        theirs = encoder.tokenizer.apply_chat_template(
            messages(record.turns), return_dict=True, return_assistant_tokens_mask=True
        )
        assert theirs["input_ids"] == ids.tolist()
        assert theirs["assistant_masks"] == (labels != IGNORE_INDEX).astype(int).tolist()


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            None,
            r"has no chat template: name another template \(--template or model\.template\): plain, tiny, vicuna_v1",
        ),
        (
            "{% for m in messages %}{{ m.role + m.content }}:<|im_end|>\n{% endfor %}",
            "writes no end token after an answer",
        ),
        ("{{ messages[-1].content }}</s>", "leaves out or repeats turns"),
        ("{% for m in messages %}{{ m.content + m.content + eos_token }}{% endfor %}", "leaves out or repeats turns"),
        ("{% for m in messages %}{{ m.content | upper + eos_token }}{% endfor %}", "leaves out or repeats turns"),
        ("{% for m in messages %}{{ m.content[1].text + eos_token }}{% endfor %}", "cannot write it"),
        ("{% for m in messages %}{{ m.content.text + eos_token }}{% endfor %}", "cannot write it: .*has no attribute"),
        ("{% for m in messages %}{{ '%s' % m.content.nothing }}{{ eos_token }}{% endfor %}", "leaves out or repeats"),
        ("{% for m in messages if m.content is not string %}{{ m.content }}</s>{% endfor %}", "leaves out or repeats"),
        ("{{ raise_exception('a system turn comes first') }}", "cannot write it: a system turn comes first"),
        ("{{ strftime_now('%d') }}" + CHATML, "writes today's date"),
        ("{{ messages | length // 6 }}" + CHATML, "writes a turn differently once more turns follow"),
        (CHATML.replace("{{ '<|im_start|>assistant\\n' }}", "{{ 'Answer:' }}"), "generation prompt is not what"),
        (
            CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
            "ends the last answer in its own way",
        ),
    ],
)
def test_templates_that_cannot_be_exact(template: str | None, reason: str) -> None:
    with pytest.raises(UsageError, match="template chat_template: .*" + reason):
        _ = own(template).end_id


@pytest.mark.parametrize("position", [0, 1])
def test_a_turn_that_the_template_would_change_is_refused(position: int) -> None:
    encoder = own(SHAPES["trims_and_begins"])
    turns = [Turn("user", "what?"), Turn("assistant", "this")]
    (good,) = encoder.encode([Record("r7", (), tuple(turns))])
    assert not isinstance(good, DataError)
    turns[position] = Turn(turns[position].role, turns[position].text + "\n")
    (bad,) = encoder.encode([Record("r7", (), tuple(turns))])
    assert str(bad) == "record r7: this llm's chat template changes the turns' text: use another template"
    if position == 0:
        with pytest.raises(DataError, match="changes the turns' text"):
            encoder.prompt(turns[:1])


def test_a_turn_that_the_template_refuses() -> None:
    picky = "{% for m in messages if 'bad' in m.content %}{{ raise_exception('no bad words') }}{% endfor %}" + CHATML
    good, bad = own(picky).encode(
        [Record("a", (), (Turn("user", "hi"), Turn("assistant", "yes"))), Record("b", (), (Turn("user", "bad"),))]
    )
    assert not isinstance(good, DataError)
    assert str(bad) == "record b: this llm's chat template cannot write it: no bad words"


def swallowing() -> PreTrainedTokenizerFast:
    """Control tokens that take the white space behind them, as Phi-3 has them."""
    tokenizer = byte_level(split_on(r"\s+|\w+"))
    for token in ("<|user|>", "<|assistant|>", "<|end|>"):
        tokenizer.backend_tokenizer.add_special_tokens([AddedToken(token, rstrip=True, special=True)])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    )
    return tokenizer


def test_control_tokens_that_take_white_space() -> None:
    """They may take the template's, but not the answer's."""
    encoder = ConversationTokenizer("chat_template", swallowing())
    good, bad = encoder.encode(
        [
            Record(name, (), (Turn("user", "hi"), Turn("assistant", text)))
            for name, text in (("a", "yes "), ("b", " yes"))
        ]
    )
    assert not isinstance(good, DataError)
    kept = good[1] != IGNORE_INDEX
    assert encoder.tokenizer.decode(good[1][kept]) == "yes <|end|>"
    assert good[1][-1] == encoder.end_id
    assert isinstance(bad, DataError)
    assert "record b" in str(bad)


def test_a_checkpoint_keeps_the_own_template_as_it_is() -> None:
    tokenizer = exact_tokenizer("qwen")
    tokenizer.chat_template = SHAPES["default_system"]
    assert chat_jinja("chat_template", tokenizer) == SHAPES["default_system"]
    assert "ASSISTANT:" in chat_jinja("vicuna_v1", tokenizer)
