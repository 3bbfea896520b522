"""TextVQA: soft accuracy of M4C's evaluator; the prompt has or lacks the output of an OCR system."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.evaluate.answers import Answered, match, read_json
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
    entries_by_id,
    find_file,
    human_reference,
    image_question,
    percent,
    take,
)
from anyres_vlm.evaluate.benchmarks.vqav2 import evalai_answer

FILES = ["TextVQA_0.5.1_val.json", "TextVQA_0*.json", "*TextVQA_val*.json"]
OCR_LINE = "\nReference OCR token: "
NUM_HUMAN = 10


@dataclass(frozen=True)
class TextVQA(Benchmark):
    """Questions about text in images. `ocr_tokens` must be chosen: with OCR tokens scores are points higher."""

    ocr_tokens: bool | None
    name = "textvqa"
    max_new_tokens = SHORT_ANSWER_TOKENS

    @property
    def protocol(self) -> Mapping[str, str]:
        """What is pinned, the use of OCR tokens first, which is unknown if answers are scored without a model."""
        words = {True: "in the prompt (Rosetta)", False: "not in the prompt", None: "unknown"}[self.ocr_tokens]
        return {
            "ocr_tokens": words,
            "prompt": SHORT_PROMPT.replace(
                "{question}", "{Question}" + (OCR_LINE + "{tokens}") * bool(self.ocr_tokens)
            ),
            "post_processing": "none before the scorer's own EvalAIAnswerProcessor",
            "scorer": f"TextVQAAccuracyEvaluator: {LLAVA}, eval_textvqa.py at 524a75b)",
        }

    def questions(self, data: Path, images: Path | None, limit: int | None) -> list[Question]:
        path = _file(data)
        if self.ocr_tokens is None:
            raise UsageError(
                "textvqa: OCR tokens in the prompt raise the score by points: choose --ocr-tokens or --no-ocr-tokens"
            )
        entries = _read(path)
        ocr_tokens = _ocr_tokens(path, entries) if self.ocr_tokens else {}
        folders = ImageFolders(data, path, images, ("train_images", "test_images"))
        questions = []
        for name, entry in list(entries.items())[:limit]:
            where = f"{path}: question {name}"
            image_id = take(entry, "image_id", str, where)
            prompt = take(entry, "question", str, where).capitalize()
            if self.ocr_tokens:
                if image_id not in ocr_tokens:
                    raise DataError(f"{where}: no OCR tokens of image {image_id}: use the file of the same split")
                prompt += OCR_LINE + ", ".join(ocr_tokens[image_id])
            image = folders.find(f"{image_id}.jpg", where)
            questions.append(image_question(take(entry, "question_id", int, where), image, prompt + SHORT_ANSWER))
        return questions

    def annotations(self, data: Path) -> list[Path]:
        path = _file(data)
        return [path] if any("answers" in entry for entry in _read(path).values()) else []

    def submission(self, data: Path, answers: Sequence[tuple[Question, str]]) -> tuple[str, Any]:
        return ".json", [{"question_id": question.id, "answer": text} for question, text in answers]

    def score(self, annotations: Sequence[Path], given: Sequence[Answered], partial: bool) -> Scored:
        (path,) = annotations
        entries = _read(path)
        ids = _ids(given, entries)
        found = match(given, set(ids) & set(entries) if partial else entries, ids)
        marks: dict[str, Mark] = {}
        for name, answer in found.items():  # in the order of the answers, as the official sum is
            where = f"{path}: question {name}"
            human = take(entries[name], "answers", list, where)
            points = soft_accuracy(answer.text, human, where)
            question, image = (str(entries[name].get(key, "")) for key in ("question", "image_id"))
            marks[name] = Mark(points, answer, question, human_reference(human), f"{image}.jpg")
        if not marks:
            raise DataError(f"{path}: no annotations in it")
        accuracy = percent([mark.points for mark in marks.values()])
        return Scored(accuracy, {"accuracy": accuracy}, marks)


def soft_accuracy(text: str, human: Sequence[Any], where: str) -> float:
    """Return the points of one answer. Ten human answers are expected, as in the official evaluator."""
    if len(human) != NUM_HUMAN or not all(isinstance(answer, str) for answer in human):
        raise DataError(f"{where}: expected {NUM_HUMAN} human answers as text, got {len(human)}: use the official file")
    normal = [evalai_answer(answer) for answer in human]
    said = evalai_answer(text)
    matching = Counter(normal)[said]
    subsets = [min(1, (matching - (left_out == said)) / 3) for left_out in normal]
    return sum(subsets) / len(subsets)


def _file(data: Path) -> Path:
    return find_file(data, FILES, "TextVQA questions")


def _read(path: Path) -> dict[str, Any]:
    """Return the entries by question id."""
    return entries_by_id(take(read_json(path), "data", list, str(path)), path, "question")


def _ocr_tokens(path: Path, entries: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return Rosetta's OCR tokens by image, from the question file or from the file published with it."""
    holders: Sequence[Any] = list(entries.values())
    where = str(path)
    if not all("ocr_tokens" in entry for entry in holders):
        split = path.stem.rpartition("_")[2]
        name = f"TextVQA_Rosetta_OCR_v0.2_{split}.json"
        file = path.with_name(name)
        if not file.exists():
            raise DataError(
                f"{path}: no ocr_tokens in it and no {name} in its folder; download it or use --no-ocr-tokens"
            )
        holders, where = take(read_json(file), "data", list, str(file)), str(file)
    tokens = {}
    for number, entry in enumerate(holders, start=1):
        place = f"{where}: entry {number}"
        tokens[take(entry, "image_id", str, place)] = [str(t) for t in take(entry, "ocr_tokens", list, place)]
    return tokens


def _ids(given: Sequence[Answered], entries: Mapping[str, Any]) -> list[str]:
    """Return the question id of each answer. LLaVA's answers name the image; their prompt holds the question."""
    by_question: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for name, entry in entries.items():
        by_question[str(entry.get("image_id")), str(entry.get("question")).lower()].append(name)
    ids = []
    for answer in given:
        if answer.id is None:
            raise DataError("an answer has no 'question_id'; TextVQA answers are matched by it")
        named = by_question[answer.id, _question_of(answer.prompt)]
        ids.append(answer.id if answer.id in entries or not named else named.pop(0))
    return ids


def _question_of(prompt: str) -> str:
    """Return the question in a prompt of LLaVA, which may begin with the OCR tokens."""
    lines = prompt.split("\n")
    return lines[1 if prompt.startswith(OCR_LINE.strip()) and len(lines) > 1 else 0].lower()
