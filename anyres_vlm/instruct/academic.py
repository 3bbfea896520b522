"""Academic question-answering sets in their official formats, as conversations with LLaVA-1.5's response formats.

All questions of an image become one conversation. The response format is said once, behind the first question, as in
LLaVA-1.5's mixture; options differ from question to question, so that multiple choice says it each time.
Source of the formats: Liu et al., Improved Baselines with Visual Instruction Tuning, 2023, table 7.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from anyres_vlm.errors import DataError
from anyres_vlm.instruct.json_stream import entry_of, stream_json, stream_members
from anyres_vlm.schema import IMAGE_TOKEN

logger = logging.getLogger(__name__)

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LETTERS = "ABCDEFGHIJ"
# What TextVQA's annotators answered where there was nothing to read.
NO_ANSWERS = ("", "unanswerable", "unsuitable", "answering does not require reading text in the image")
COCO_2014 = "COCO_train2014_{:012d}.jpg"
COCO_2017 = "{:012d}.jpg"

Conversation = dict[str, Any]  # an entry of LLaVA's JSON
Pair = tuple[str, str]  # question, answer


def read_vqav2(questions: Path, annotations: Path | None, image_name: str | None) -> Iterator[Conversation]:
    """VQAv2 and, in the same format, OK-VQA. Raises `DataError` for a question without an annotation."""
    if annotations is None:
        raise DataError(f"{questions}: VQAv2's questions have no answers: give its annotations too")
    answers: dict[int, str] = {}
    for entry in stream_json(annotations, "annotations.item"):
        with entry_of(annotations, "annotation", entry):
            given = entry.get("multiple_choice_answer") or _most_frequent(a["answer"] for a in entry["answers"])
            answers[int(entry["question_id"])] = str(given)
    images: dict[str, list[Pair]] = {}
    for entry in stream_json(questions, "questions.item"):
        with entry_of(questions, "question", entry):
            number, image = int(entry["question_id"]), (image_name or COCO_2014).format(int(entry["image_id"]))
            asked = str(entry["question"])
        if number not in answers:
            raise DataError(
                f"{questions}: question {number} has no annotation in {annotations}: give files of one split"
            )
        images.setdefault(image, []).append((asked, answers[number]))
    return _joined(images, SHORT)


def read_gqa(questions: Path) -> Iterator[Conversation]:
    """GQA's balanced questions: an object of questions by id."""
    images: dict[str, list[Pair]] = {}
    for number, entry in stream_members(questions):
        with entry_of(questions, f"question {number}", entry):
            images.setdefault(f"{entry['imageId']}.jpg", []).append((str(entry["question"]), str(entry["answer"])))
    return _joined(images, SHORT)


def read_textvqa(data: Path) -> Iterator[Conversation]:
    """TextVQA; the answer is the most frequent of ten. Questions that have none are counted and left out."""
    images: dict[str, list[Pair]] = {}
    without = 0
    for entry in stream_json(data, "data.item"):
        with entry_of(data, "question", entry):
            image, asked, answers = f"{entry['image_id']}.jpg", str(entry["question"]), entry["answers"]
            answer = _most_frequent(str(text) for text in answers if str(text).strip().lower() not in NO_ANSWERS)
        if answer is None:
            without += 1
        else:
            images.setdefault(image, []).append((asked, answer))
    if without:
        logger.warning("%s: %d questions without an answer are left out", data, without)
    return _joined(images, SHORT)


def read_ocrvqa(data: Path) -> Iterator[Conversation]:
    """OCR-VQA's training split (1): an object of book covers by id."""
    for number, entry in stream_members(data):
        with entry_of(data, f"book {number}", entry):
            if int(entry["split"]) != 1:
                continue
            image = number + (PurePosixPath(entry["imageURL"]).suffix or ".jpg")
            pairs = list(zip(map(str, entry["questions"]), map(str, entry["answers"]), strict=True))
        yield from _joined({image: pairs}, SHORT)


def read_aokvqa(data: Path, image_name: str | None) -> Iterator[Conversation]:
    """A-OKVQA's multiple choice; each image comes as often as a question has choices, its answer at another letter."""
    images: dict[str, list[tuple[str, list[str], int]]] = {}
    for entry in stream_json(data, "item"):
        with entry_of(data, "question", entry):
            choices, right = [str(choice) for choice in entry["choices"]], int(entry["correct_choice_idx"])
            image = (image_name or COCO_2017).format(int(entry["image_id"]))
            if not 0 <= right < len(choices) <= len(LETTERS):
                raise ValueError(f"choice {right} of {len(choices)}")
            images.setdefault(image, []).append((str(entry["question"]), choices, right))
    for image, questions in images.items():
        for turn in range(max(len(choices) for _, choices, _ in questions)):
            pairs = [_choice(asked, choices, right, turn) for asked, choices, right in questions]
            yield conversation(f"{PurePosixPath(image).stem}-{turn}", image, pairs)


def conversation(name: str, image: str | None, pairs: Iterable[Pair]) -> Conversation:
    """An entry of LLaVA's JSON."""
    turns: list[dict[str, str]] = []
    for question, answer in pairs:
        opening = f"{IMAGE_TOKEN}\n" if image is not None and not turns else ""
        turns += [{"from": "human", "value": opening + question.strip()}, {"from": "gpt", "value": answer.strip()}]
    return {"id": name, **({} if image is None else {"image": image}), "conversations": turns}


def _joined(images: dict[str, list[Pair]], response_format: str) -> Iterator[Conversation]:
    """One conversation an image; pairs that lack a word are left out."""
    for image, pairs in images.items():
        whole = [(question, answer) for question, answer in pairs if question.strip() and answer.strip()]
        if whole:
            first = (f"{whole[0][0].strip()}\n{response_format}", whole[0][1])
            yield conversation(PurePosixPath(image).stem, image, [first, *whole[1:]])


def _choice(asked: str, choices: list[str], right: int, turn: int) -> Pair:
    """The question with its choices turned by so many letters."""
    turn %= len(choices)
    order = choices[turn:] + choices[:turn]
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, order, strict=False)]
    return "\n".join([asked.strip(), *lines, LETTER]), LETTERS[(right - turn) % len(choices)]


def _most_frequent(answers: Iterable[str]) -> str | None:
    """The first of the most frequent ones; None of none."""
    counted = Counter(answers).most_common(1)
    return counted[0][0] if counted else None
