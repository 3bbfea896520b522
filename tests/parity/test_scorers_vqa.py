"""VQAv2's and TextVQA's scores beside tables worked out by hand, a brute force over subsets, and official packages."""

from __future__ import annotations

import importlib.util
import itertools
import random
import re
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from score_command import run_score, scored

from anyres_vlm.evaluate.benchmarks.vqa import CONTRACTIONS, vqa_answer

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

    class Questions:
        def getQuesIds(self) -> list[int]:
            return []

    official = official_module("lavis", "common/vqa_tools/vqa_eval.py").VQAEval(Questions(), None)
    texts = [text for answer, human in random_questions(8, 2000) for text in (answer, *human)]
    for text in [*texts, *official.contractions, *CONTRACTIONS]:
        assert vqa_answer(text) == official.processDigitArticle(official.processPunctuation(text)), repr(text)
