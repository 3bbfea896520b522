"""GQA's and POPE's scores worked out by hand, and files that do not fit together."""

from __future__ import annotations

import json
from typing import Any

import pytest
from score_command import run_score, scored

from anyres_vlm.evaluate.benchmarks.pope import yes_or_no

# ---- GQA ------------------------------------------------------------------------------------------------------------


def gqa_question(answer: str, structural: str, semantic: str, balanced: bool = True) -> dict[str, Any]:
    types = {"structural": structural, "semantic": semantic, "detailed": "x"}
    return {"question": "?", "imageId": "1", "answer": answer, "isBalanced": balanced, "types": types}


GQA_QUESTIONS = {
    "1": gqa_question("yes", "verify", "obj"),
    "2": gqa_question("blue", "query", "attr"),
    "3": gqa_question("left", "choose", "rel"),
    "4": gqa_question("blue", "query", "obj", balanced=False),
    "5": gqa_question("café", "query", "obj"),
}


def test_gqa_by_hand(tmp_path, capsys) -> None:
    texts = {"1": "Yes.", "2": "blue...", "3": "left side", "5": "CAFÉ"}
    expected = {
        "accuracy": 75.0,
        "binary": 50.0,
        "open": 100.0,
        "accuracyPerStructuralType": {"choose": 0.0, "query": 100.0, "verify": 100.0},
        "accuracyPerSemanticType": {"attr": 100.0, "obj": 100.0, "rel": 0.0},
    }
    words = [{"question_id": name, "text": text} for name, text in texts.items()]
    assert scored(tmp_path, capsys, "gqa", words, GQA_QUESTIONS) == expected
    submitted = [{"questionId": name, "prediction": text} for name, text in texts.items()]
    assert scored(tmp_path, capsys, "gqa", submitted, GQA_QUESTIONS)["accuracy"] == 0.0  # exact match, as eval.py
    right = [{"questionId": name, "prediction": text.rstrip(".").lower()} for name, text in texts.items()]
    assert scored(tmp_path, capsys, "gqa", right, GQA_QUESTIONS) == expected
    unbalanced = [*right, {"questionId": "4", "prediction": "no"}]
    assert scored(tmp_path, capsys, "gqa", unbalanced, GQA_QUESTIONS) == expected


# ---- POPE -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Yes", "yes"),
        ("No", "no"),
        ("no, there is", "no"),
        ("NO", "yes"),  # capitals are no word of the rule
        ("There is not.", "no"),
        ("Yes. No, wait", "yes"),
        ("No\nmore", "yes"),  # words are split at spaces alone
        ("", "yes"),
        ("Nothing", "yes"),
        ("I see none, no", "no"),
        (".no", "yes"),
        ("n,o", "no"),
        ("\u00a0no", "yes"),
    ],
)
def test_pope_words(text: str, said: str) -> None:
    assert yes_or_no(text) == said


def pope_lines(labels: str) -> str:
    entries = [
        {"question_id": n, "image": "a.jpg", "text": "Is there a cat?", "label": {"y": "yes", "n": "no"}[label]}
        for n, label in enumerate(labels, start=1)
    ]
    return "".join(json.dumps(entry) + "\n" for entry in entries)


POPE_RATES = {  # said yes, yes, yes, no, no: 2 hits, 1 false alarm, 1 miss, 1 right no
    "accuracy": 3 / 5,
    "precision": 2 / 3,
    "recall": 2 / 3,
    "f1": 2 * (2 / 3) * (2 / 3) / (2 / 3 + 2 / 3),
    "yes_ratio": 3 / 5,
}
POPE_SAID = ["Yes", "yes it is", "Sure", "No", "not at all"]


def test_pope_by_hand(tmp_path, capsys) -> None:
    official = {"coco_pope_random.json": pope_lines("yynyn")}
    by_id = [{"question_id": n, "text": text} for n, text in enumerate(POPE_SAID, start=1)]
    by_llavas_id = [{"question_id": 10_000_000 + n, "text": text} for n, text in enumerate(POPE_SAID, start=1)]
    in_order = [{"question": "Is there a cat?", "answer": text} for text in POPE_SAID]
    for answers in (by_id, by_id[::-1], by_llavas_id, in_order):
        assert scored(tmp_path, capsys, "pope", answers, official) == {"random": POPE_RATES}


def test_pope_of_several_splits(tmp_path, capsys) -> None:
    official = {f"coco_pope_{split}.json": pope_lines("yynyn") for split in ("adversarial", "popular", "random")}
    splits = {"adversarial": 0, "popular": 20_000_000, "random": 10_000_000}
    wrong = ["No" if said.lower()[0] in "ys" else "Yes" for said in POPE_SAID]
    llava = [
        {"question_id": offset + n, "text": text}
        for split, offset in splits.items()
        for n, text in enumerate(wrong if split == "popular" else POPE_SAID, start=1)
    ]
    named = [
        {"question_id": answer["question_id"] % 10_000_000, "text": answer["text"], "category": split}
        for split, answer in zip([s for s in splits for _ in range(5)], llava, strict=True)
    ]
    for answers in (llava, named):
        scores = scored(tmp_path, capsys, "pope", answers, official)
        assert scores["adversarial"] == scores["random"] == POPE_RATES
        assert scores["popular"]["accuracy"] == 2 / 5
    nothing = [answer | {"text": "no"} for answer in llava]
    assert scored(tmp_path, capsys, "pope", nothing, official)["random"] == {
        "accuracy": 2 / 5, "precision": None, "recall": 0.0, "f1": None, "yes_ratio": 0.0,
    }  # fmt: skip
    unnamed = [answer | {"question_id": answer["question_id"] % 10_000_000} for answer in llava]
    status, _, said = run_score(tmp_path, capsys, "pope", unnamed, official)
    assert status == 1
    assert "5 questions answered twice ('1', '2', '3', ...)" in said


# ---- ids and files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ([], "1 question without an answer ('7') of 1"),
        ([{"question_id": 7, "answer": "a"}, {"question_id": "7", "answer": "b"}], "1 question answered twice ('7')"),
        ([{"question_id": 8, "answer": "a"}, {"question_id": 7, "answer": "b"}], "not among the annotations ('8')"),
        ([{"answer": "a"}], "not among the annotations ('')"),
        ([{"question_id": 7, "answer": None}], "answer 1: expected text, got null"),
    ],
)
def test_answers_that_do_not_fit(tmp_path, capsys, answers, words) -> None:
    official = {"annotations": [{"question_id": 7, "question_type": "x", "answer_type": "y", "answers": []}]}
    status, out, said = run_score(tmp_path, capsys, "vqav2", answers, official)
    assert (status, out) == (1, "")
    assert words in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "official", "words"),
    [
        ("vqav2", {"questions": []}, "expected list under 'annotations'"),
        ("vqav2", {"annotations": [{"question_id": 1}]}, "question 1: expected list under 'answers'"),
        ("vqav2", {"annotations": [7]}, "annotation 1: expected int under 'question_id'"),
        ("gqa", [], "expected an object of questions by id, got list"),
        ("gqa", {"1": {"isBalanced": True}}, "question 1: expected str under 'answer'"),
        ("textvqa", {"data": [{"question_id": 1, "image_id": "a", "question": "q"}]}, "expected list under 'answers'"),
        (
            "pope",
            {"x_pope_a.json": [{"question_id": 1, "label": "maybe"}]},
            "expected the label yes or no, got 'maybe'",
        ),
    ],
)
def test_files_that_are_not_official(tmp_path, capsys, name, official, words) -> None:
    status, _, said = run_score(tmp_path, capsys, name, [{"question_id": 1, "text": "a"}], official)
    assert status == 1
    assert words in said
