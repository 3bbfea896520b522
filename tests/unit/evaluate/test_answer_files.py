"""Answer files of every form, and what is wrong with others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from anyres_vlm.errors import DataError
from anyres_vlm.evaluate.answers import Answered, match, read_answers


def written(folder: Path, text: str) -> Path:
    (folder / "answers.json").write_text(text, encoding="utf-8")
    return folder / "answers.json"


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        ([{"question_id": 1, "answer": "x"}], Answered("1", "x", raw=False)),
        ([{"questionId": "1", "prediction": "x"}], Answered("1", "x", raw=False)),
        ([{"question_id": "1", "text": "x", "prompt": "p?"}], Answered("1", "x", raw=True, prompt="p?")),
        ([{"question_id": 1, "text": "x", "image": "a.jpg"}], Answered("1", "x", raw=True, image="a.jpg")),
        ([{"question_id": 1, "text": "x", "image": 7}], Answered("1", "x", raw=True)),
        ([{"text": "x", "category": "c"}], Answered(None, "x", raw=True, category="c")),
        ({"v1_0": "x"}, Answered("v1_0", "x", raw=False)),
        ([{"question_id": 1, "text": "\ud83d"}], Answered("1", "\ud83d", raw=True)),
    ],
)
def test_forms(tmp_path: Path, content: Any, answer: Answered) -> None:
    assert read_answers(written(tmp_path, json.dumps(content))) == [answer]


def test_json_lines(tmp_path: Path) -> None:
    entries = [{"question_id": number, "text": text} for number, text in enumerate(["a", "b\u2028c\x0b", ""])]
    text = "\ufeff" + "\r\n\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries) + "\n"
    assert [answer.text for answer in read_answers(written(tmp_path, text))] == ["a", "b\u2028c\x0b", ""]
    assert len(read_answers(written(tmp_path, json.dumps(entries[0]) + "\n"))) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON"),
        ("[1]", "answer 1: expected an object, got int"),
        ('[{"question_id": 1}]', "answer 1: expected 'text', 'answer' or 'prediction'"),
        ('[{"question_id": 1, "text": null}]', "answer 1: expected text, got null"),
        ('[{"question_id": 1, "answer": 2}]', "answer 1: expected text, got 2"),
        ('[{"question_id": true, "text": "a"}]', "expected a number or text as the question's id, got True"),
        ('[{"question_id": 1.5, "text": "a"}]', "got 1.5"),
        ('{"v1_0": "a", "v1_0": "b"}', "key 'v1_0' occurs twice"),
        ('{"v1_0": ["a"]}', "answer v1_0: expected text"),
        ('{"question_id": 1, "text": "a"}\n{"question', "line 2: not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("7", "answer 1: expected an object"),
    ],
)
def test_what_is_no_answer_file(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(DataError, match=r"answers\.json") as caught:
        read_answers(written(tmp_path, text))
    assert words in str(caught.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'[{"question_id": 1, "text": "\xff"}]')
    with pytest.raises(DataError, match="expected JSON in UTF-8"):
        read_answers(tmp_path / "a.json")
    with pytest.raises(DataError, match="no such file"):
        read_answers(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ("1", "1 question without an answer ('2') of 2"),
        ("121", "1 question answered twice ('1') of 2: keep one"),
        ("12345678", "6 questions not among the annotations ('3', '4', '5', ...) of 2"),
    ],
)
def test_each_question_once(ids: str, words: str) -> None:
    with pytest.raises(DataError) as caught:
        match([Answered(name, "", raw=True) for name in ids], ["1", "2"], Path("questions.json"), partial=False)
    assert words in str(caught.value)
