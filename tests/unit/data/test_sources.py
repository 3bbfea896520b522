"""LLaVA JSON: what is read, what is rejected and how it is said."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from anyres_vlm.data.sources import read_records
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
    read = read_records(path, tmp_path / "pictures", 0.0)
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
        (record(conversations=[{"from": "gpt", "value": "Hi"}]), "expected the user, got 'gpt'"),
        (record(conversations=[{"from": "system", "value": "Hi"}]), "expected the user, got 'system'"),
        (record(conversations=turns("<image>", " ")), "turn 2: the text is empty"),
        (record(conversations=[{"from": "human"}]), "expected text under 'value'"),
        (record(conversations=turns("no picture", "yes")), "0 <image> in the text, but 1 images"),
        (record(image=None), "1 <image> in the text, but 0 images"),
        (record(image="../a.png"), "outside the image folder"),
        (record(image="/etc/passwd"), "outside the image folder"),
        (record(image=5), "must be a file name"),
    ],
)
def test_bad_records_are_named(tmp_path: Path, entry: Any, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        read_records(write(tmp_path / "data.json", [entry]), None, 0.0)
    assert reason in str(caught.value)
    assert "max_bad_fraction" in str(caught.value)


def test_a_few_bad_records_are_left_out_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "data.json", [record(id=str(n)) for n in range(99)] + [record(image=None)])
    with caplog.at_level(logging.WARNING):
        assert len(read_records(path, None, 0.01)) == 99
    assert "1 of 100 records are bad" in caplog.text
    with pytest.raises(DataError):
        read_records(path, None, 0.005)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"id": 1,]', r"a\.json line 1 column 11: malformed JSON"),
        ("a.jsonl", '{}\n{"id"}', r"a\.jsonl line 2 column 6: malformed JSON"),
        ("a.json", '{"id": 1}', "expected a list of records, got dict"),
        ("a.json", "[]", "contains no records"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_records(tmp_path / name, None, 1.0)
    with pytest.raises(DataError, match="no such file"):
        read_records(tmp_path / "none.json", None, 1.0)
