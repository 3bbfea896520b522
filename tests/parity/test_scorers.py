"""Scores beside independent ones: tables worked out by hand, a brute force over subsets, official packages."""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
import re
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from anyres_vlm.cli.main import main
from anyres_vlm.evaluate.pope import yes_or_no

PIECES = [
    *(
        "a",
        "The",
        "an",
        "none",
        "Two",
        "TEN",
        "dont",
        "hes",
        "wouldve",
        "somebody'd",
        "1,000",
        "1,2",
        "3.5",
        ".5",
        "5.",
    ),
    *("U.S.", "yes", "No.", "don't", "cat's", "café", "٣,٤", "\u00a0", "\u2028", "re-do", "a/b", "<b>", "[x]", "\n"),
    *("\t", "", "?!", "- -", "." * 35, "İ", "e\u0301"),
]
GLUE = [" ", " ", "", ",", ", ", ". ", ".", "\n", " ?", "-", "; "]


def scored(folder: Path, capsys: pytest.CaptureFixture, name: str, answers: Any, annotations: Any) -> dict[str, Any]:
    """What `anyres score` prints for these contents."""
    status, out, err = run_score(folder, capsys, name, answers, annotations)
    assert status == 0, err
    return json.loads(out)["scores"]


def run_score(
    folder: Path, capsys: pytest.CaptureFixture, name: str, answers: Any, annotations: Any
) -> tuple[int, str, str]:
    given = folder / "answers.json"
    given.write_text(json.dumps(answers))
    files = annotations if isinstance(annotations, dict) and name == "pope" else {"official.json": annotations}
    for file, content in files.items():
        (folder / file).write_text(content if isinstance(content, str) else json.dumps(content))
    flags = [word for file in files for word in ("--annotations", str(folder / file))]
    capsys.readouterr()
    status = main(["score", name, "--answers", str(given), *flags, "--json"])
    return status, *capsys.readouterr()


# ---- VQAv2 and TextVQA: another way to the same numbers -------------------------------------------------------------

MARKS = r"""; / [ ] " { } ( ) = + \ _ - > < @ ` , ? !""".split()
DIGITS = {"none": "0", "two": "2", "ten": "10"}  # those of the pieces above
MENDED = {"dont": "don't", "hes": "he's", "wouldve": "would've", "somebody'd": "somebodyd"}


def slow_normal(text: str) -> str:
    """The official rules, letter by letter, for the words that the pieces can make."""
    number = re.search(r"\d,\d", text)
    drop = {m for m in MARKS if number or re.search(rf"(?: {re.escape(m)})|(?:{re.escape(m)} )", text)}
    letters = ["" if c in drop else " " if c in MARKS else c for c in text]
    joined, periods, kept = "".join(letters), 0, ""
    for place, letter in enumerate(joined):
        is_stripped = letter == "." and not joined[place + 1 : place + 2].isdecimal() and periods < 32
        periods += is_stripped
        kept += "" if is_stripped else letter
    words = [DIGITS.get(word, word) for word in kept.lower().split()]
    return " ".join(MENDED.get(word, word) for word in words if word not in ("a", "an", "the"))


def subsets_of_nine(said: str, human: list[str]) -> Fraction:
    """Mean over every subset that leaves one person out."""
    shares = [min(Fraction(1), Fraction(nine.count(said), 3)) for nine in itertools.combinations(human, len(human) - 1)]
    return sum(shares, Fraction(0)) / len(shares)


def slow_vqa(text: str, human: list[str]) -> Fraction:
    def plain(t: str) -> str:
        return re.sub(r"[\n\t]", " ", t).strip()

    answers = [plain(answer) for answer in human]
    if len(set(answers)) == 1:
        return subsets_of_nine(plain(text), answers)
    return subsets_of_nine(slow_normal(plain(text)), [slow_normal(answer) for answer in answers])


def slow_evalai(text: str) -> str:
    spaced = re.sub("'s", " 's", re.sub("[,?]", "", text.lower())).strip()
    return slow_normal(re.sub(r"[\n\t]", " ", spaced).strip())


def random_questions(seed: int, count: int) -> list[tuple[str, list[str]]]:
    rng = random.Random(seed)

    def text() -> str:
        return "".join(rng.choice(PIECES) + rng.choice(GLUE) for _ in range(rng.randint(0, 3)))

    def varied(said: str) -> str:
        return rng.choice([said, said, said.upper(), f"the {said}", f"{said}.", f"{said}!", said.replace("'", "")])

    questions = []
    for _ in range(count):
        base = [text() for _ in range(rng.randint(1, 3))]
        human = [varied(rng.choice(base)) if rng.random() < 0.8 else base[0] for _ in range(10)]
        questions.append((varied(rng.choice(human)), human if rng.random() < 0.8 else base[:1] * 10))
    return questions


def vqa_annotation(number: int, human: list[str], kind: str = "other") -> dict[str, Any]:
    answers = [{"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate(human, start=1)]
    return {"question_id": number, "question_type": f"type {number % 3}", "answer_type": kind, "answers": answers}


@pytest.mark.parametrize(
    ("text", "human", "points"),
    [
        ("red", ["red"] * 3 + ["blue"] * 7, 90.0),  # 7 subsets have all three, 3 have two: (7 + 3 * 2/3) / 10
        ("red", ["red"] * 2 + ["blue"] * 8, 60.0),
        ("red", ["red"] + ["blue"] * 9, 30.0),
        ("red", ["red"] * 4 + ["blue"] * 6, 100.0),
        ("RED!", ["red"] * 4 + ["blue"] * 6, 100.0),
        ("Red", ["red"] * 10, 0.0),  # all people agree: nothing is normalised
        (" red\n", ["red"] * 10, 100.0),
        ("two", ["2"] * 5 + ["two"] * 5, 100.0),
        ("none", ["none"] * 9 + ["0"], 100.0),
        ("", ["the"] * 9 + ["a"], 100.0),
        ("yes.", ["yes."] * 10, 100.0),
        ("it is red. I think", ["red"] * 9 + ["it"], 0.0),
    ],
)
def test_vqa_by_hand(tmp_path, capsys, text, human, points) -> None:
    official = {"annotations": [vqa_annotation(7, human)]}
    scores = scored(tmp_path, capsys, "vqav2", [{"question_id": 7, "answer": text}], official)
    assert scores == {
        "overall": points,
        "perAnswerType": {"other": points},
        "perQuestionType": {"type 1": points},
    }


def test_people_without_ids_are_told_by_their_words(tmp_path, capsys) -> None:
    """The official code leaves out whoever equals the one left out."""
    answers = [{"answer": "red"}] * 6 + [{"answer": "blue"}] * 4
    official = {"annotations": [vqa_annotation(1, []) | {"answers": answers}]}
    assert scored(tmp_path, capsys, "vqav2", [{"question_id": 1, "answer": "red"}], official)["overall"] == 40.0


@pytest.mark.parametrize("seed", range(3))
def test_vqa_beside_brute_force(tmp_path, capsys, seed) -> None:
    questions = random_questions(seed, 100)
    official = [vqa_annotation(n, human, "yes/no" if n % 2 else "other") for n, (_, human) in enumerate(questions)]
    for convert, key in ((lambda text: text, "answer"), (slow_evalai, "text")):
        points = [slow_vqa(convert(text), human) for text, human in questions]
        answers = [{"question_id": n, key: text} for n, (text, _) in enumerate(questions)]
        random.Random(seed).shuffle(answers)
        scores = scored(tmp_path, capsys, "vqav2", answers, {"annotations": official})
        assert scores["overall"] == float(sum(points))  # of 100 questions: a percent each, one digit exactly
        assert scores["perAnswerType"] == {"other": float(sum(points[::2]) * 2), "yes/no": float(sum(points[1::2]) * 2)}
        assert 10 < scores["overall"] < 95


@pytest.mark.parametrize("seed", range(3))
def test_textvqa_beside_brute_force(tmp_path, capsys, seed) -> None:
    questions = random_questions(seed, 100)
    data = [
        {"question_id": n, "image_id": f"i{n // 2}", "question": f"what is {n}?", "answers": human}
        for n, (_, human) in enumerate(questions)
    ]
    points = [
        subsets_of_nine(slow_evalai(text), [slow_evalai(answer) for answer in human]) for text, human in questions
    ]
    submission = [{"question_id": n, "answer": text} for n, (text, _) in enumerate(questions)]
    prompts = ["What is {}?\nReference OCR token: x, y\nShortly.", "Reference OCR token: x\nWhat is {}?\nShortly."]
    prompts.append("What is {}?\nShortly.")
    llava = [
        {"question_id": f"i{n // 2}", "prompt": prompts[n % 3].format(n), "text": text}
        for n, (text, _) in enumerate(questions)
    ]
    for answers in (submission, llava, llava[::-1]):
        assert scored(tmp_path, capsys, "textvqa", answers, {"data": data}) == {"accuracy": float(sum(points))}
    status, _, said = run_score(tmp_path, capsys, "textvqa", submission, {"data": [data[0] | {"answers": ["a"] * 9}]})
    assert status == 1
    assert "99 questions not among" in said
    status, _, said = run_score(
        tmp_path, capsys, "textvqa", submission[:1], {"data": [data[0] | {"answers": ["a"] * 9}]}
    )
    assert "expected 10 human answers as text, got 9" in said


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
    official = {"annotations": [vqa_annotation(7, ["a"] * 10)]}
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


# ---- official packages ----------------------------------------------------------------------------------------------


def official_module(package: str, path: str) -> ModuleType:
    """One file of an installed package, without the package's own imports."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        pytest.skip(f"{package} is not installed")
    spec = importlib.util.spec_from_file_location(Path(path).stem, Path(found.origin).parent / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_textvqa_beside_mmf(tmp_path, capsys) -> None:
    """PyPI `mmf`: the file that LLaVA's evaluator is a copy of."""
    evaluator = official_module("mmf", "utils/m4c_evaluators.py").TextVQAAccuracyEvaluator()
    questions = random_questions(9, 5000)
    pairs = [{"pred_answer": text, "gt_answers": human} for text, human in questions]
    data = [{"question_id": n, "answers": human} for n, (_, human) in enumerate(questions)]
    answers = [{"question_id": n, "answer": text} for n, (text, _) in enumerate(questions)]
    accuracy = scored(tmp_path, capsys, "textvqa", answers, {"data": data})["accuracy"]
    assert f"{accuracy:.2f}" == f"{100.0 * evaluator.eval_pred_list(pairs):.2f}"


@pytest.mark.slow
def test_normal_forms_beside_lavis() -> None:
    """PyPI `salesforce-lavis`: VQA's own evaluation but for the condition under which it normalises."""
    from anyres_vlm.evaluate.normalisation import CONTRACTIONS, vqa_answer

    class Questions:
        def getQuesIds(self) -> list[int]:
            return []

    official = official_module("lavis", "common/vqa_tools/vqa_eval.py").VQAEval(Questions(), None)
    texts = [text for answer, human in random_questions(8, 2000) for text in (answer, *human)]
    for text in [*texts, *official.contractions, *CONTRACTIONS]:
        assert vqa_answer(text) == official.processDigitArticle(official.processPunctuation(text)), repr(text)
