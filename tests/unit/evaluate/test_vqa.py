"""Normal forms worked out by hand from the official rules, slips included, and the layouts of the test archive."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from anyres_vlm.evaluate.benchmarks.vqa import CONTRACTIONS, VQAv2, evalai_answer, one_line, vqa_answer


@pytest.mark.parametrize(
    ("questions", "images", "named"),
    [
        ("", "test2015", None),
        ("", "", None),
        ("v2_Questions_Test_mscoco", "test2015", None),  # each archive in a folder of its name
        ("v2_Questions_Test_mscoco", "images/test2015", "images"),
        ("Questions", "Images/mscoco/test2015", None),  # as VQA's repository has them
        ("vqav2/Questions", "vqav2/Images/mscoco/test2015", None),
        ("", "elsewhere/coco/test2015", "elsewhere/coco"),
        ("", "elsewhere/coco/test2015", "elsewhere/coco/test2015"),
    ],
)
def test_the_test_archive_in_the_layouts_people_have(
    tmp_path: Path, questions: str, images: str, named: str | None
) -> None:
    (tmp_path / questions).mkdir(parents=True, exist_ok=True)
    (tmp_path / images).mkdir(parents=True, exist_ok=True)
    meta = {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "license": {}}
    asked = [{"image_id": n % 3 + 1, "question": "Why?", "question_id": n} for n in range(6)]
    for subset, part in (("test2015", asked), ("test-dev2015", asked[2:4])):
        file = tmp_path / questions / f"v2_OpenEnded_mscoco_{subset}_questions.json"
        file.write_text(json.dumps(meta | {"data_subtype": subset, "questions": part}))
    for number in (1, 2, 3):
        (tmp_path / images / f"COCO_test2015_{number:012d}.jpg").touch()
    found = VQAv2().questions(tmp_path, None if named is None else tmp_path / named, None)
    assert [question.id for question in found] == [2, 3]
    names = [question.images[0].path for question in found]
    assert names == [tmp_path / images / f"COCO_test2015_{n:012d}.jpg" for n in (3, 1)]
    sent = VQAv2().submission(tmp_path, [(question, "Red.") for question in found])[1]
    assert [line["answer"] for line in sent] == ["", "", "red", "red", "", ""]


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Red CAR", "red car"),
        ("none", "0"),
        ("Ten of an apple", "10 of apple"),
        ("twenty", "twenty"),
        ("dont", "don't"),
        ("DONT", "don't"),
        ("somebody'd", "somebodyd"),  # the official list has it the wrong way round
        ("Im", "im"),  # its capital entries are never reached, for words are lower by then
        ("couldn'tve", "couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("red, white", "red white"),  # next to a space: removed
        ("red,white", "red white"),  # elsewhere: a space
        ("re-do - it", "redo it"),  # one mark next to a space removes all of its kind
        ("well-known", "well known"),
        ("1,000", "1000"),  # a comma inside a number takes every mark away
        ("1,000 a/b", "1000 ab"),
        ("1,,000", "1 000"),
        ("it's 3.50.", "it's 3.50"),
        ("U.S.A.", "usa"),
        (".5", ".5"),
        ("5.", "5"),
        ("a.b", "ab"),
        ("." * 40, "." * 8),  # 32 periods at most
        ("(a) [the] {an}", ""),
        ("¿qué?", "¿qué"),
        ("٣.٤", "٣.٤"),  # digits of any script
        ("e\u0301 ½", "e\u0301 ½"),
        ("a\u2028the\u00a0b", "b"),
        ("", ""),
        ("?!", ""),
    ],
)
def test_vqa_answers(text: str, normal: str) -> None:
    assert vqa_answer(text) == normal


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The poster shows a 10% discount.", "poster shows 10% discount"),
        ("Denny's", "denny 's"),
        ("What, me?", "what me"),
        ("1,000", "1000"),
        ("a,b", "ab"),  # commas go before anything else, unlike in VQA's own rules
        ("A", ""),
        (" two\nlines\t", "2 lines"),
        ("'s", "'s"),
        ("it's-it", "it 's it"),
    ],
)
def test_evalai_answers(text: str, normal: str) -> None:
    assert evalai_answer(text) == normal


def test_the_list_of_contractions() -> None:
    assert len(CONTRACTIONS) == 114
    assert CONTRACTIONS["hed've"] == CONTRACTIONS["he'dve"] == "he'd've"
    assert "hes" in CONTRACTIONS
    assert not {"shes", "lets", "shell", "were", "wed", "shed"} & set(CONTRACTIONS)
    assert one_line(" a\n b\tc\r") == "a  b c"
