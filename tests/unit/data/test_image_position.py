"""Images move to the front of their questions as in LLaVA-NeXT, and system texts go where templates have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizer_kinds import exact_tokenizer
from transformers import PreTrainedTokenizerFast

from anyres_vlm.cli.main import main
from anyres_vlm.config import ImagePosition, TemplateName
from anyres_vlm.data.conversation import ConversationTokenizer, images_first
from anyres_vlm.data.index.build import Built, Shard, build_index
from anyres_vlm.data.index.rows import IndexSettings
from anyres_vlm.data.index.table import read_index
from anyres_vlm.data.loader import IndexedSamples
from anyres_vlm.data.sources import open_source
from anyres_vlm.data.templates import TEMPLATES
from anyres_vlm.errors import DataError
from anyres_vlm.geometry import Tiling
from anyres_vlm.schema import Record, Turn

TILING = Tiling((), 28, 14)
TURN = "{% if m.role == 'user' %}U:{{ m.content }};{% elif m.role == 'assistant' %}A:{{ m.content }}</s>{% endif %}"
OPENED = "{% if add_generation_prompt %}A:{% endif %}"
WITHOUT = f"{{% for m in messages %}}{TURN}{{% endfor %}}{OPENED}"
SYSTEM = "{% if messages[0].role == 'system' %}[{{ messages[0].content | trim }}]\n{% endif %}"
RAISING = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("What?\n<image>", "<image>\nWhat?"),
        ("What is <image> this?", "<image>\nWhat is  this?"),
        (" \n<image>", "<image>"),
        ("<image>\nWhat?", "<image>\nWhat?"),
        ("<image>What?", "<image>What?"),
        ("A <image> and <image>?", "A <image> and <image>?"),
        ("What?", "What?"),
    ],
)
def test_the_rule(before: str, after: str) -> None:
    turns = (Turn("user", before), Turn("assistant", "x"))
    moved = images_first(turns)
    assert [turn.text for turn in moved] == [after, "x"]
    assert (moved is turns) == (before == after)


def test_every_question_has_its_own_image() -> None:
    turns = [Turn("user", "a <image>"), Turn("assistant", "x"), Turn("user", "b <image>"), Turn("assistant", "y")]
    assert [turn.text for turn in images_first(turns)] == ["<image>\na", "x", "<image>\nb", "y"]


def test_training_and_prompts_see_the_same(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    turns = (Turn("user", "What?\n<image>"), Turn("assistant", "a star"))
    front, as_is = (ConversationTokenizer("vicuna_v1", tiny_tokenizer, name) for name in ("front", "as_is"))
    (moved,), (kept,) = front.encode([Record("r", (), turns)]), as_is.encode([Record("r", (), turns)])
    assert not isinstance(moved, DataError)
    assert not isinstance(kept, DataError)
    prompt = front.prompt(turns[:1])
    assert moved[0][: len(prompt)].tolist() == prompt.tolist()
    assert moved[0].tolist() != kept[0].tolist()
    assert moved[0].tolist() == as_is.encode([Record("r", (), tuple(images_first(turns)))])[0][0].tolist()  # type: ignore[index]


def entries() -> list[dict[str, Any]]:
    def one(number: int, *turns: str) -> dict[str, Any]:
        roles = ("gpt", "human") if turns[0] == "Hello!" else ("human", "gpt")
        said = [{"from": roles[place % 2], "value": text} for place, text in enumerate(turns)]
        return {"id": number, "image": "a.png", "conversations": said}

    return [
        one(0, "<image>\nWhat?", "A star."),
        one(1, "What?\n<image>", "A star."),
        one(2, "Which <image>?", "A star."),
        one(3, "Hello!", "What?\n<image>", "A star."),
        one(4, "Hello!", "<image>\nWhat?", "A star."),
        one(5, "What?\n<image>", ""),  # a reject: it is no change
        {**one(6, "What?\n<image>", "A star."), "video": "a.mp4"},
    ]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    (tmp_path / "data.json").write_text(json.dumps(entries()))
    return tmp_path / "data.json"


def build(data: Path, tokenizer: PreTrainedTokenizerFast, position: ImagePosition, out: str, **options: Any) -> Built:
    conversation = ConversationTokenizer("vicuna_v1", tokenizer, position)
    settings = IndexSettings(conversation, TILING, 4096)
    return build_index(data, None, settings, data.with_name(out), workers=1, max_bad_fraction=0.9, **options)


def test_changes_are_counted_in_the_index(data: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    whole = build(data, tiny_tokenizer, "front", "a.parquet").index
    assert whole.changes == {"moved <image> to the front": 3, "dropped a leading assistant turn": 2}
    assert build(data, tiny_tokenizer, "as_is", "b.parquet").index.changes == {"dropped a leading assistant turn": 2}
    for number in (1, 2, 3):
        built = build(data, tiny_tokenizer, "front", "c.parquet", shard=Shard(number, 3))
    assert built.index.changes == whole.changes
    assert data.with_name("c.parquet").read_bytes() == whole.path.read_bytes()


def test_system_texts_that_the_template_drops_are_counted(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    data = tmp_path / "data.json"
    said = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A star."}]
    data.write_text(json.dumps([{"conversations": said, "system": system} for system in ("Be brief.", "")]))
    settings = IndexSettings(ConversationTokenizer("plain", tiny_tokenizer), TILING, 4096)
    built = build_index(data, None, settings, tmp_path / "a.parquet", workers=1, max_bad_fraction=0)
    assert built.index.changes == {"dropped the system text, as the template keeps images and answers only": 1}


def test_an_index_of_the_other_position_is_made_again(data: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert build(data, tiny_tokenizer, "front", "a.parquet").rows_read == 7
    assert build(data, tiny_tokenizer, "front", "a.parquet").rows_read == 0
    assert build(data, tiny_tokenizer, "as_is", "a.parquet").rows_read == 7


def test_samples_are_those_of_the_index(data: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    index = build(data, tiny_tokenizer, "front", "a.parquet").index
    conversation = ConversationTokenizer("vicuna_v1", tiny_tokenizer, "front")
    samples = IndexedSamples(open_source(data), index, conversation, TILING)
    ids = [samples.sample(position).input_ids for position in np.flatnonzero(index.ok)]
    assert len(ids) == 5
    assert all(one.tolist() == ids[0].tolist() for one in (ids[1], ids[3], ids[4]))


def test_the_command_says_what_it_changed(data: Path, tiny_bases: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = data.with_name("a.parquet")
    base = f"model={{llm: {tiny_bases / 'llm'}, encoder: {{name: {tiny_bases / 'vit'}}}, template: vicuna_v1}}"
    command = ["index", str(data), "--out", str(out), "--set", base, "--max-bad-fraction", "0.9"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "changed:  moved <image> to the front: 3\n" in shown
    assert "changed:  dropped a leading assistant turn: 2\n" in shown
    assert "video 1" in shown
    assert read_index(out).settings["image_position"] == "front"
    assert main([*command, "--image-position", "as_is", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["changes"] == {"dropped a leading assistant turn": 2}


SYSTEMS = {
    "vicuna_v1": "Be brief. USER: Q ASSISTANT: A</s>",
    "llama_2": "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nQ [/INST] A </s>",
    "llama_3": "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n"
    "<|im_start|>assistant\nA<|im_end|>\n",
    "chatml_direct": "<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\nQ<|im_end|>"
    "<|im_start|>assistant\nA<|im_end|>",
}
DIALOGUE = (Turn("user", "Q"), Turn("assistant", "A"))


@pytest.mark.parametrize("template", TEMPLATES)
def test_each_template_writes_a_system_text_or_refuses_it(template: TemplateName) -> None:
    tokenizer = exact_tokenizer("llama_legacy")
    encoder = ConversationTokenizer(template, tokenizer)
    (result,) = encoder.encode([Record("r", (), DIALOGUE, system="Be brief.")])
    if template == "plain":
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<image>"}]
        messages += [{"role": "assistant", "content": "A"}]
        served = tokenizer.apply_chat_template(messages, chat_template=TEMPLATES[template].jinja, tokenize=False)
        assert served == encoder.render([Turn("user", "<image>"), DIALOGUE[1]], system="Be </s> brief.")[0]
        (bare, forged) = encoder.encode([Record(text, (), DIALOGUE, system=text) for text in ("", "Be </s> brief.")])
        assert all(not isinstance(one, DataError) and one[0].tolist() == bare[0].tolist() for one in (result, forged))
        return
    if template not in SYSTEMS:
        assert isinstance(result, DataError)
        assert result.kind == "system"
        assert "record r: it has a system text, which this template cannot write" in str(result)
        return
    text, spans = encoder.render(DIALOGUE, system="Be brief.")
    assert text.removeprefix("<|begin_of_text|>") == SYSTEMS[template]
    assert [text[first:end].strip()[0] for first, end in spans] == ["A"]
    assert not isinstance(result, DataError)
    messages = [{"role": "system", "content": "Be brief."}]
    messages += [{"role": turn.role, "content": turn.text} for turn in DIALOGUE]
    served = tokenizer.apply_chat_template(messages, chat_template=TEMPLATES[template].jinja, tokenize=False)
    assert served == text
    prompt = encoder.prompt(DIALOGUE[:1], "Be brief.")
    assert result[0][: len(prompt)].tolist() == prompt.tolist()


def with_template(jinja: str) -> PreTrainedTokenizerFast:
    tokenizer = exact_tokenizer("llama_legacy")
    tokenizer.chat_template = jinja
    return tokenizer


def test_own_chat_templates_get_a_system_message() -> None:
    encoder = ConversationTokenizer("chat_template", with_template(SYSTEM + WITHOUT))
    text, spans = encoder.render(DIALOGUE, system="Be brief.")
    assert text == "[Be brief.]\nU:Q;A:A</s>"
    assert [text[first:end] for first, end in spans] == ["A</s>"]
    good, bad = encoder.encode(
        [Record("r", (), DIALOGUE, system="Be brief."), Record("s", (), DIALOGUE, system="Be </s> brief.")]
    )
    assert not isinstance(good, DataError)
    assert isinstance(bad, DataError)
    assert bad.kind == "control_token"


@pytest.mark.parametrize(
    ("jinja", "message"), [(RAISING + WITHOUT, "no system role"), (WITHOUT, "does not write a system text")]
)
def test_own_chat_templates_without_a_system_role_reject(jinja: str, message: str) -> None:
    encoder = ConversationTokenizer("chat_template", with_template(jinja))
    good, bad = encoder.encode([Record("r", (), DIALOGUE), Record("s", (), DIALOGUE, system="Be brief.")])
    assert not isinstance(good, DataError)
    assert isinstance(bad, DataError)
    assert message in str(bad)
    assert bad.kind == "system"
