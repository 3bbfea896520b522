"""GQA: exact match on the balanced questions, by structural and semantic type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anyres_vlm.errors import DataError
from anyres_vlm.evaluate.answers import Answered, match
from anyres_vlm.evaluate.benchmarks.base import (
    LLAVA,
    SHORT_ANSWER,
    SHORT_ANSWER_TOKENS,
    SHORT_PROMPT,
    Benchmark,
    ImageFolders,
    Mark,
    Question,
    Scored,
    find_file,
    image_question,
    make_mark,
    mean_by,
    percent,
    questions_by_id,
    take,
)

FILES = ["testdev_balanced_questions.json", "*_questions.json", "*questions*.json"]
TYPES = {"accuracyPerStructuralType": "structural", "accuracyPerSemanticType": "semantic"}


class GQA(Benchmark):
    """Compositional questions about scenes."""

    name = "gqa"
    max_new_tokens = SHORT_ANSWER_TOKENS
    protocol: Mapping[str, str] = {
        "prompt": SHORT_PROMPT,
        "post_processing": f"lower case, no periods at the end: {LLAVA}, convert_gqa_for_eval.py at a689fd8)",
        "scorer": "GQA, eval.py 1.2",
    }

    def questions(self, data: Path, images: Path | None, limit: int | None) -> list[Question]:
        path = _file(data)
        folders = ImageFolders(data, path, images, ())
        questions = []
        for name, entry in list(questions_by_id(path).items())[:limit]:
            where = f"{path}: question {name}"
            image = folders.find(f"{take(entry, 'imageId', str, where)}.jpg", where)
            questions.append(image_question(name, image, take(entry, "question", str, where) + SHORT_ANSWER))
        return questions

    def annotations(self, data: Path) -> list[Path]:
        path = _file(data)
        entries = questions_by_id(path).values()
        return [path] if any(isinstance(entry, dict) and "answer" in entry for entry in entries) else []

    def submission(self, data: Path, answers: Sequence[tuple[Question, str]]) -> tuple[str, Any]:
        return ".json", [{"questionId": question.id, "prediction": prediction(text)} for question, text in answers]

    def score(self, annotations: Sequence[Path], given: Sequence[Answered], partial: bool) -> Scored:
        (path,) = annotations
        wanted = questions_by_id(path)
        answered = {answer.id for answer in given}
        # As in eval.py, unbalanced questions are not counted and need no answer.
        expected = [
            name
            for name, entry in wanted.items()
            if name in answered or (not partial and take(entry, "isBalanced", bool, f"{path}: question {name}"))
        ]
        found = match(given, expected, path, partial)
        marks: dict[str, Mark] = {}
        typed: list[tuple[dict[str, str], float]] = []
        for name in expected:
            entry, where = wanted[name], f"{path}: question {name}"
            if not take(entry, "isBalanced", bool, where):
                continue
            answer = found[name]
            truth = take(entry, "answer", str, where)
            types = take(entry, "types", dict, where)
            kinds = tuple(f"{key}: {take(types, key, str, where)}" for key in TYPES.values())
            points = float(truth == (prediction(answer.text) if answer.raw else answer.text))
            question, image = (str(entry.get(key, "")) for key in ("question", "imageId"))
            marks[name] = make_mark(points, answer, question, truth, f"{image}.jpg", kinds)
            typed.append((types, points))
        if not marks:
            raise DataError(f"{path}: no balanced questions in it")
        accuracy = percent([mark.points for mark in marks.values()])
        halves = {"binary": 0.0, "open": 0.0}
        halves |= mean_by((("open" if of["structural"] == "query" else "binary", hit) for of, hit in typed), percent)
        by_type = {kind: mean_by(((of[key], hit) for of, hit in typed), percent) for kind, key in TYPES.items()}
        return Scored(accuracy, {"accuracy": accuracy, **halves, **by_type}, marks)


def prediction(text: str) -> str:
    """Return a model's answer in the form that LLaVA submits."""
    return text.rstrip(".").lower()


def _file(data: Path) -> Path:
    return find_file(data, FILES, "GQA questions")
