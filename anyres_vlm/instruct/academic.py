"""Convert academic question-answering sets and region descriptions to conversations in LLaVA-1.5's formats.

All questions about an image become one conversation. The response format is given once, after the first question, as
in LLaVA-1.5's mixture; in multiple choice, where the options differ, it follows every question.
A box is written as in LLaVA-1.5, left, top, right, bottom with two decimals, but as fractions of the image's own sides:
an AnyRes thumbnail shows the whole image, which LLaVA-1.5 padded to a square first.
Source of the formats: Liu et al., Improved Baselines with Visual Instruction Tuning, 2023, table 7.
"""

from __future__ import annotations

import io
import json
import logging
import pickle
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from anyres_vlm.data.blobs import read_blob
from anyres_vlm.errors import DataError
from anyres_vlm.geometry import Size
from anyres_vlm.instruct.annotations import Box, box_in, entry_of, read_descriptions, stream_json, stream_members
from anyres_vlm.schema import IMAGE_TOKEN

logger = logging.getLogger(__name__)

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LETTERS = "ABCDEFGHIJ"
# Answers of TextVQA's annotators to questions about images without readable text.
NO_ANSWERS = ("", "unanswerable", "unsuitable", "answering does not require reading text in the image")
COCO_2014 = "COCO_train2014_{:012d}.jpg"
COCO_2017 = "{:012d}.jpg"

Conversation = dict[str, Any]  # an entry of LLaVA's JSON
Pair = tuple[str, str]  # question, answer


def read_vqav2(questions: Path, annotations: Path | None, image_name: str | None) -> Iterator[Conversation]:
    """Read VQAv2 or, in the same format, OK-VQA. Raises `DataError` for a question without an annotation."""
    if annotations is None:
        raise DataError(f"{questions}: VQAv2's answers are in another file: give it as annotations")
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
    """Read GQA's balanced questions, a JSON object of questions by id."""
    images: dict[str, list[Pair]] = {}
    for number, entry in stream_members(questions):
        with entry_of(questions, f"question {number}", entry):
            images.setdefault(f"{entry['imageId']}.jpg", []).append((str(entry["question"]), str(entry["answer"])))
    return _joined(images, SHORT)


def read_textvqa(data: Path) -> Iterator[Conversation]:
    """Read TextVQA with the most frequent of ten answers. Questions without one are counted and left out."""
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
    """Read OCR-VQA's training split (1), a JSON object of book covers by id."""
    for number, entry in stream_members(data):
        with entry_of(data, f"book {number}", entry):
            if int(entry["split"]) != 1:
                continue
            image = number + (PurePosixPath(entry["imageURL"]).suffix or ".jpg")
            pairs = list(zip(map(str, entry["questions"]), map(str, entry["answers"]), strict=True))
        yield from _joined({image: pairs}, SHORT)


def read_aokvqa(data: Path, image_name: str | None) -> Iterator[Conversation]:
    """Read A-OKVQA's multiple choice, one conversation per image and rotation of the choices, as in LLaVA-1.5."""
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
    """Return an entry of LLaVA's JSON."""
    turns: list[dict[str, str]] = []
    for question, answer in pairs:
        opening = f"{IMAGE_TOKEN}\n" if image is not None and not turns else ""
        turns += [{"from": "human", "value": opening + question.strip()}, {"from": "gpt", "value": answer.strip()}]
    return {"id": name, **({} if image is None else {"image": image}), "conversations": turns}


def _joined(images: dict[str, list[Pair]], response_format: str) -> Iterator[Conversation]:
    """Yield one conversation per image; pairs with an empty question or answer are left out."""
    for image, pairs in images.items():
        whole = [(question, answer) for question, answer in pairs if question.strip() and answer.strip()]
        if whole:
            first = (f"{whole[0][0].strip()}\n{response_format}", whole[0][1])
            yield conversation(PurePosixPath(image).stem, image, [first, *whole[1:]])


def _choice(asked: str, choices: list[str], right: int, turn: int) -> Pair:
    """Return a question with its choices rotated by `turn` letters, and the letter of the right one."""
    turn %= len(choices)
    order = choices[turn:] + choices[:turn]
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, order, strict=False)]
    return "\n".join([asked.strip(), *lines, LETTER]), LETTERS[(right - turn) % len(choices)]


def _most_frequent(answers: Iterable[str]) -> str | None:
    """Return the most frequent answer, the first in a tie; None if there is none."""
    counted = Counter(answers).most_common(1)
    return counted[0][0] if counted else None


DESCRIBE = "Please provide a short description for this region: {}."
LOCATE = "Please provide the bounding box coordinate of the region this sentence describes: {}."
LONGEST = 9  # regions per conversation; LLaVA-1.5 has fewer than ten turns in RefCOCO's
OF_A_GENOME = 10  # regions drawn per Visual Genome image, as in LLaVA-1.5

Region = tuple[str, Box]


def read_refcoco(refs: Path, instances: Path | None, image_name: str | None, seed: int) -> Iterator[Conversation]:
    """Read the training split of RefCOCO, RefCOCO+ or RefCOCOg: `refs(...).p`, or its JSON, and `instances.json`.

    Raises `DataError` if the files do not belong together.
    """
    if instances is None:
        raise DataError(f"{refs}: RefCOCO's boxes are in another file: give its instances.json as annotations")
    sizes: dict[int, Size] = {}
    for entry in stream_json(instances, "images.item"):
        with entry_of(instances, "image", entry):
            sizes[int(entry["id"])] = Size(height=int(entry["height"]), width=int(entry["width"]))
    boxes: dict[int, Box | None] = {}
    for entry in stream_json(instances, "annotations.item"):
        with entry_of(instances, "annotation", entry):
            left, top, width, height = map(float, entry["bbox"])
            boxes[int(entry["id"])] = box_in(sizes[int(entry["image_id"])], left, top, width, height)
    images: dict[int, list[Region]] = {}
    for entry in _read_refs(refs):
        with entry_of(refs, "reference", entry):
            if entry["split"] != "train":
                continue
            box, image = boxes[int(entry["ann_id"])], int(entry["image_id"])
            if box is not None:
                images.setdefault(image, []).extend((str(said["sent"]), box) for said in entry["sentences"])
    for image, regions in images.items():
        yield from _both_ways((image_name or COCO_2014).format(image), regions, seed)


def read_genome(regions: Path, images: Path | None, seed: int) -> Iterator[Conversation]:
    """Read Visual Genome's region descriptions, up to ten per image."""
    for scene in read_descriptions(regions, images):
        found = [(item.name, item.box) for item in scene.objects]
        chance = random.Random(f"{seed} {scene.image}")
        yield from _both_ways(scene.image, chance.sample(found, min(len(found), OF_A_GENOME)), seed)


def _both_ways(image: str, regions: Sequence[Region], seed: int) -> Iterator[Conversation]:
    """Yield conversations about one image in which each region is, at random, described or located."""
    chance = random.Random(f"{seed} {image} ways")
    for start in range(0, len(regions), LONGEST):
        pairs: list[Pair] = []
        for phrase, box in regions[start : start + LONGEST]:
            said = phrase.strip().rstrip(".")
            place = f"[{', '.join(f'{side:.2f}' for side in box)}]"
            describe = chance.random() < 0.5
            pairs.append((DESCRIBE.format(place), said) if describe else (LOCATE.format(said), place))
        yield conversation(f"{PurePosixPath(image).stem}-{start // LONGEST}", image, pairs)


def _read_refs(path: Path) -> list[Any]:
    content = read_blob(path)
    try:
        found = json.loads(content) if path.suffix == ".json" else _Plain(io.BytesIO(content), encoding="latin1").load()
    except (pickle.UnpicklingError, ValueError, EOFError, IndexError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{path}: cannot be read as RefCOCO's references: {error}") from None
    if not isinstance(found, list):
        raise DataError(f"{path}: expected a list of references, got {type(found).__name__}")
    return found


class _Plain(pickle.Unpickler):
    """Reads pickled lists, dictionaries, numbers and strings, and nothing that could run code."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """Raise `UnpicklingError`: RefCOCO's files contain no classes."""
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, which plain data does not")
