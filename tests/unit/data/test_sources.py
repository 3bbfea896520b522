"""LLaVA JSON: what is read, what is rejected and how it is said; what every kind of source promises."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from anyres_vlm.data.sources import open_source, read_records
from anyres_vlm.errors import DataError
from anyres_vlm.schema import Turn


def record(**changes: Any) -> dict[str, Any]:
    good = {
        "id": "a",
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A star."}],
    }
    return {key: value for key, value in {**good, **changes}.items() if value is not None}


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]


def write(path: Path, entries: list[Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, entries)) if path.suffix == ".jsonl" else json.dumps(entries))
    return path


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_both_dialects_of_turns_and_images(tmp_path: Path, name: str) -> None:
    messages = [{"role": "user", "content": "Hi <image> <image>"}, {"role": "assistant", "content": "Two."}]
    text_only = record(image=None, conversations=turns("Hi", "Hello"))
    several = {"images": ["b/c.png", "d.png"], "messages": messages}
    path = write(tmp_path / name, [record(), several, text_only])
    read = read_records(path, tmp_path / "pictures")
    assert [image.path for image in read[0].images] == [tmp_path / "pictures" / "a.png"]
    assert read[0].turns == (Turn("user", "<image>\nWhat?"), Turn("assistant", "A star."))
    assert [image.path for image in read[1].images] == [
        tmp_path / "pictures" / "b/c.png",
        tmp_path / "pictures" / "d.png",
    ]
    assert read[2].images == ()


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("text", "expected an object"),
        (record(conversations=[]), "non-empty list"),
        (record(conversations=turns("<image> Hi")), "nothing answers it"),
        (record(conversations=[{"from": "gpt", "value": "Hi"}]), "no question: expected a turn of the user, got only"),
        (record(conversations=[{"from": "narrator", "value": "Hi"}]), "expected the user, got 'narrator'"),
        (record(conversations=turns("<image>", " ")), "turn 2: the text is empty"),
        (record(conversations=[{"from": "human"}]), "expected text under 'value'"),
        (record(conversations=turns("no picture", "yes")), "0 <image> in the text, but 1 images"),
        (record(image=None), "1 <image> in the text, but 0 images"),
        (record(image="../a.png"), "outside the image folder"),
        (record(image="/etc/passwd"), "outside the image folder"),
        (record(image=5), "must be a file name"),
        (record(image="a\0.png"), "must be a file name"),
        (record(image="\ud800.png"), "record a: the image's name contains a lone surrogate"),
        (record(conversations=turns("<image>", "\udcff")), "record a turn 2: the text contains a lone surrogate"),
        (
            record(conversations=None, messages=[{"role": "user", "content": 5}]),
            "turn 1: expected text under 'content'",
        ),
        (
            record(conversations=None, messages=[{"role": "user", "content": [{"type": "mesh"}]}]),
            "record a turn 1: expected parts of type 'text' or 'image', got 'mesh'",
        ),
        (record(conversations=None), "expected a non-empty list under 'conversations' or 'messages'"),
    ],
)
def test_bad_records_are_named(tmp_path: Path, entry: Any, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        read_records(write(tmp_path / "data.json", [entry]), None)
    assert reason in str(caught.value)


def test_a_single_bad_record_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "data.json", [record(id=str(n)) for n in range(99)] + [record(image=None)])
    with pytest.raises(DataError, match=r"1 of 100 records are bad .*: fix or remove them"):
        read_records(path, None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{}\n{"id"}', r"a\.jsonl line 2 column 6: malformed JSON"),
        ("a.json", "[]", "contains no records"),
        ("a.json", '[{"id": "x", "conversations": }]', r"a\.json line 1 column 31: malformed JSON: Expecting value"),
        ("a.json", '[{"id": "x"}\n {}]', r"a\.json line 2 column 2: malformed JSON: Extra data"),
        ("a.jsonl", "\n\n", "contains no records"),
        ("a.jsonl", "[" * 100_000, r"a\.jsonl line 1 column 2: cannot be parsed as JSON"),
        ("a.jsonl", "1" * 5000, r"a\.jsonl line 1 column 1: cannot be parsed as JSON"),
        ("a.txt", "[]", r"expected \.json or \.jsonl, \.parquet or \.tar files .* got a\.txt"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_records(tmp_path / name, None)
    with pytest.raises(DataError, match="no such file"):
        read_records(tmp_path / "none.json", None)


def test_parts_of_chat_datasets_and_the_cauldron(tmp_path: Path) -> None:
    parts = [
        {"type": "text", "text": "Look:"},
        {"type": "image", "text": None},
        {"type": "text", "text": "What is it?"},
    ]
    answer = [{"type": "text", "text": "A star."}]
    chat = {
        "image": "a.png",
        "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}],
    }
    texts = [{"user": "What?", "assistant": "A star."}, {"user": "Where?", "assistant": "There."}]
    cauldron = {"image": None, "images": ["a.png", "b.png"], "texts": texts}
    read = read_records(write(tmp_path / "a.jsonl", [chat, cauldron]), None)
    assert read[0].turns == (Turn("user", "Look:\n<image>\nWhat is it?"), Turn("assistant", "A star."))
    assert [turn.text for turn in read[1].turns] == ["<image>\n<image>\nWhat?", "A star.", "Where?", "There."]
    assert [record.id for record in read] == ["1", "2"]


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"id": 1}\n{"id": "\xff"}')
    source = open_source(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"a\.jsonl line 2 column 9: cannot be read as UTF-8 text"):
        source.record(1)


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_any_row_equals_the_stream_and_its_copies(tmp_path: Path, name: str) -> None:
    entries = [record(id=f"é{n}", conversations=turns(f"<image> {{[{n}", "x\n")) for n in range(50)]
    entries[17] = "no object"
    source = open_source(write(tmp_path / name, entries))
    stream = list(source.records(0, len(source)))
    assert len(stream) == 50
    assert isinstance(stream[17], DataError)
    copy = pickle.loads(pickle.dumps(source))
    order = [row for row in range(49, -1, -1) if row != 17]
    assert [copy.record(row) for row in order] == [stream[row] for row in order]
    assert [record.id for record in source.records(20, 23)] == ["é20", "é21", "é22"]
    with pytest.raises(DataError, match="record 18: expected an object, got str"):
        source.record(17)


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [record()])
    before = open_source(path).fingerprint()
    assert open_source(path, tmp_path).fingerprint() == before
    assert open_source(path, tmp_path / "other").fingerprint() != before
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    assert open_source(path.rename(moved / "a.json")).fingerprint() == before
    assert open_source(write(moved / "a.json", [record(id="b")])).fingerprint() != before


def test_a_file_that_shrank_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [record(), record()])
    source = open_source(path)
    path.write_text("[]")
    with pytest.raises(
        DataError, match=r"a\.json record 2: .* ends before it: .* the file changed since it was opened"
    ):
        source.record(1)
