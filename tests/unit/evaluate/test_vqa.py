"""Normal forms worked out by hand from the official rules, slips included."""

from __future__ import annotations

import pytest

from anyres_vlm.evaluate.benchmarks.vqa import CONTRACTIONS, evalai_answer, one_line, vqa_answer


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
