"""The tokenizer's own chat template gives the ids of transformers and exact labels, or a reason why it cannot."""

from __future__ import annotations

import random

import pytest
from label_oracle import expected_labels, odd_record, ordinary_record
from tokenizer_kinds import EXACT, byte_level, exact_tokenizer, split_on
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

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
        (None, "has no chat template: use another template: plain, tiny, vicuna_v1"),
        ("{% for m in messages %}{{ m.role + m.content }}\n{% endfor %}", "writes no end token behind an answer"),
        ("{{ messages[-1].content }}</s>", "leaves out or repeats turns"),
        ("{% for m in messages %}{{ m.content + m.content + eos_token }}{% endfor %}", "leaves out or repeats turns"),
        ("{% for m in messages %}{{ m.content | upper + eos_token }}{% endfor %}", "leaves out or repeats turns"),
        ("{% for m in messages %}{{ m.content[0].text + eos_token }}{% endfor %}", "cannot write it"),
        ("{{ raise_exception('a system turn comes first') }}", "cannot write it: a system turn comes first"),
        ("{{ strftime_now('%d') }}" + CHATML, "writes today's date"),
        ("{{ messages | length // 6 }}" + CHATML, "writes a turn differently as the dialogue goes on"),
        (
            "{% for m in messages %}{{ '<|im_start|>' + m.role }}"
            "{% if m.role == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
            "{{ m.content + '<|im_end|>' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}",
            "writes a turn differently as the dialogue goes on",
        ),
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
