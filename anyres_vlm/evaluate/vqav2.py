"""VQAv2: soft accuracy, the mean over the ten subsets of nine human answers of min(1, matches / 3)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anyres_vlm.errors import DataError
from anyres_vlm.evaluate.answers import Answered, as_id, match, read_json
from anyres_vlm.evaluate.benchmark import (
    LLAVA,
    SHORT_ANSWER,
    SHORT_ANSWER_TOKENS,
    SHORT_PROMPT,
    ImageFolders,
    Mark,
    Question,
    Scored,
    find_file,
    human_reference,
    take,
)
from anyres_vlm.evaluate.normalisation import evalai_answer, one_line, vqa_answer

WHOLE_TEST = "v2_OpenEnded_mscoco_test2015_questions.json"


class VQAv2:
    """Open-ended questions about COCO's pictures."""

    name = "vqav2"
    max_new_tokens = SHORT_ANSWER_TOKENS
    protocol: Mapping[str, str] = {
        "prompt": SHORT_PROMPT,
        "post_processing": f"EvalAIAnswerProcessor: {LLAVA}, convert_vqav2_for_submission.py at a689fd8)",
        "scorer": "GT-Vision-Lab/VQA, vqaEval.py at a013f00",
    }

    def questions(self, data: Path, images: Path | None, limit: int | None) -> list[Question]:
        path = _questions_file(data)
        content = read_json(path)
        subset = take(content, "data_subtype", str, str(path))
        split = "test2015" if subset.startswith("test") else subset  # test-dev2015 is a part of test2015
        folders = ImageFolders(path, images, (split,))
        questions = []
        for number, entry in enumerate(take(content, "questions", list, str(path))[:limit], start=1):
            where = f"{path}: question {number}"
            image = _image_name(split, take(entry, "image_id", int, where))
            prompt = take(entry, "question", str, where) + SHORT_ANSWER
            questions.append(Question(take(entry, "question_id", int, where), folders.find(image, where), prompt))
        return questions

    def annotations(self, data: Path) -> list[Path]:
        questions = _questions_file(data)
        name = questions.name.replace("OpenEnded_", "").replace("questions", "annotations")
        return [path for path in (questions.with_name(name),) if path.exists() and path != questions]

    def submission(self, data: Path, answers: Sequence[tuple[Question, str]]) -> tuple[str, Any]:
        said = {question.id: evalai_answer(text) for question, text in answers}
        whole = _questions_file(data).with_name(WHOLE_TEST)
        if whole.exists():  # the server wants every question of test2015, as LLaVA sends it
            entries = take(read_json(whole), "questions", list, str(whole))
            names = [take(e, "question_id", int, f"{whole}: question {n}") for n, e in enumerate(entries, 1)]
            said = dict.fromkeys(names, "") | said if set(said) <= set(names) else said
        return ".json", [{"question_id": name, "answer": text} for name, text in said.items()]

    def score(self, annotations: Sequence[Path], given: Sequence[Answered], partial: bool) -> Scored:
        (path,) = annotations
        content = read_json(path)
        entries = take(content, "annotations", list, str(path))
        subset = content.get("data_subtype", "val2014")
        wanted = {
            as_id(take(e, "question_id", int, f"{path}: annotation {n}"), ""): e for n, e in enumerate(entries, 1)
        }
        if partial:
            answered = {answer.id for answer in given}
            wanted = {name: entry for name, entry in wanted.items() if name in answered}
        found = match(given, wanted)
        marks: dict[str, Mark] = {}
        by_type: dict[str, dict[str, list[float]]] = {
            "perAnswerType": defaultdict(list),
            "perQuestionType": defaultdict(list),
        }
        for name, entry in wanted.items():
            where = f"{path}: question {name}"
            answer = found[name]
            text = evalai_answer(answer.text) if answer.raw else answer.text
            human = take(entry, "answers", list, where)
            points = soft_accuracy(text, human, where)
            kinds = take(entry, "answer_type", str, where), take(entry, "question_type", str, where)
            for groups, kind in zip(by_type.values(), kinds, strict=True):
                groups[kind].append(points)
            reference = human_reference([said["answer"] for said in human])
            image = _image_name(subset, entry.get("image_id", 0))
            named = f"answer: {kinds[0]}", f"question: {kinds[1]}"
            marks[name] = Mark(points, answer, "", reference, image, named)  # the questions are in another file
        if not marks:
            raise DataError(f"{path}: no annotations in it")
        overall = _percent([mark.points for mark in marks.values()])
        types = {kind: {name: _percent(of[name]) for name in sorted(of)} for kind, of in by_type.items()}
        return Scored(overall, {"overall": overall, **types}, marks)


def soft_accuracy(text: str, answers: Sequence[Any], where: str) -> float:
    """One question's points. Where all people gave one answer, nothing is normalised beyond white space."""
    human = [{**answer, "answer": one_line(take(answer, "answer", str, where))} for answer in answers]
    if not human:
        raise DataError(f"{where}: no human answers")
    said = one_line(text)
    if len({answer["answer"] for answer in human}) > 1:
        human = [{**answer, "answer": vqa_answer(answer["answer"])} for answer in human]
        said = vqa_answer(said)
    matching = [answer for answer in human if answer["answer"] == said]
    subsets = [min(1, sum(other != left_out for other in matching) / 3) for left_out in human]
    return sum(subsets) / len(subsets)


def _image_name(subset: str, number: int) -> str:
    return f"COCO_{subset}_{str(number).zfill(12)}.jpg"


def _questions_file(data: Path) -> Path:
    return find_file(data, ["v2_OpenEnded_mscoco_*_questions.json", "*questions*.json"], "VQAv2 questions")


def _percent(points: Sequence[float]) -> float:
    return round(100 * sum(points) / len(points), 2)
