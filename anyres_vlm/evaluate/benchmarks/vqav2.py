"""VQAv2: soft accuracy, and the normalisation of answers that the VQA and TextVQA evaluations use.

An answer gets the mean over the ten subsets of nine human answers of min(1, matches / 3). The normalisation follows
GT-Vision-Lab/VQA, vqaEval.py at a013f00, and the answer processor of MMF's M4C evaluator, which LLaVA uses for TextVQA
and for VQAv2 submissions. Their bugs are kept, so that scores are equal.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from anyres_vlm.errors import DataError
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
    find_files,
    human_reference,
    image_question,
    only_file,
    take,
)

SUBSETS = ("train2014", "val2014", "test2015", "test-dev2015")
WITH_ANSWERS = ("train2014", "val2014")
WHOLE_TEST = "v2_OpenEnded_mscoco_test2015_questions.json"
TEST_DEV = "v2_OpenEnded_mscoco_test-dev2015_questions.json"
FILES = ("v2_OpenEnded_mscoco_*_questions.json", "*questions*.json")

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
NUMBERS["none"] = "0"
ARTICLES = frozenset({"a", "an", "the"})
COMMA_IN_NUMBER = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")
PERIODS_REMOVED = 32  # both sources pass a flag of `re` with the value 32 where `sub` expects a count

APOSTROPHES = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've "
    "weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll "
    "why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
).split()


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:place] + word[place + 1 :] for place, letter in enumerate(word) if letter == "'"]


CONTRACTIONS = {wrong: right for right in APOSTROPHES for wrong in _without_one_apostrophe(right)}
CONTRACTIONS["somebody'd"] = "somebodyd"  # reversed in the sources


class VQAv2(Benchmark):
    """Open-ended questions about COCO images."""

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
        subset = _subset(content, path)
        split = "test2015" if subset == "test-dev2015" else subset  # a part of test2015, with its images
        folders = ImageFolders(data, path, images, (split, f"Images/mscoco/{split}"))  # the latter: VQA's own layout
        questions = []
        for number, entry in enumerate(take(content, "questions", list, str(path))[:limit], start=1):
            where = f"{path}: question {number}"
            image = folders.find(_image_name(split, take(entry, "image_id", int, where)), where)
            prompt = take(entry, "question", str, where) + SHORT_ANSWER
            questions.append(image_question(take(entry, "question_id", int, where), image, prompt))
        return questions

    def annotations(self, data: Path) -> list[Path]:
        questions = _questions_file(data)
        subset = _subset(read_json(questions), questions)
        named = questions.name.replace("OpenEnded_", "").replace("questions", "annotations")
        name = f"v2_mscoco_{subset}_annotations.json" if named == questions.name else named
        if questions.with_name(name).exists():
            return [questions.with_name(name)]
        if subset not in WITH_ANSWERS:
            return []
        if data.is_file():
            raise DataError(f"{questions}: no {name} in its folder; the answers to {subset} are public: download them")
        return find_files(data, [name], f"answers to {subset}, which are public,")[:1]

    def submission(self, data: Path, answers: Sequence[tuple[Question, str]]) -> tuple[str, Any]:
        said: dict[Any, str] = {question.id: evalai_answer(text) for question, text in answers}
        whole = _questions_file(data).with_name(WHOLE_TEST)
        if whole.exists():  # the server expects every question of test2015; LLaVA sends empty answers to the others
            entries = take(read_json(whole), "questions", list, str(whole))
            names = [take(e, "question_id", int, f"{whole}: question {n}") for n, e in enumerate(entries, 1)]
            said = dict.fromkeys(names, "") | said if set(said) <= set(names) else said
        return ".json", [{"question_id": name, "answer": text} for name, text in said.items()]

    def score(self, annotations: Sequence[Path], given: Sequence[Answered], partial: bool) -> Scored:
        (path,) = annotations
        content = read_json(path)
        entries = take(content, "annotations", list, str(path))
        subset = content.get("data_subtype", "val2014")
        wanted = entries_by_id(entries, path, "annotation")
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
            labels = f"answer: {kinds[0]}", f"question: {kinds[1]}"
            marks[name] = Mark(points, answer, "", reference, image, labels)  # the questions are in another file
        if not marks:
            raise DataError(f"{path}: no annotations in it")
        overall = _percent([mark.points for mark in marks.values()])
        types = {kind: {name: _percent(of[name]) for name in sorted(of)} for kind, of in by_type.items()}
        return Scored(overall, {"overall": overall, **types}, marks)


def soft_accuracy(text: str, answers: Sequence[Any], where: str) -> float:
    """Return the points of one answer. If all human answers are equal, only white space is normalised."""
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


def one_line(text: str) -> str:
    """Replace line ends and tabs by spaces and strip the text."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def strip_punctuation(text: str) -> str:
    """Remove or blank punctuation by the official rule.

    A mark is removed everywhere if it occurs next to a space or if any number in the text has a comma; otherwise it
    becomes a space.
    """
    has_number_comma = COMMA_IN_NUMBER.search(text) is not None
    stripped = text
    for mark in PUNCTUATION:
        is_removed = has_number_comma or f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if is_removed else " ")
    return PERIOD.sub("", stripped, count=PERIODS_REMOVED)


def normalise_words(text: str) -> str:
    """Lower the case, write number words as digits, drop articles, restore apostrophes, use single spaces."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


@lru_cache(maxsize=1 << 16)  # human answers repeat
def vqa_answer(text: str) -> str:
    """Normalise a one-line answer as VQA's evaluation does."""
    return normalise_words(strip_punctuation(text))


def evalai_answer(text: str) -> str:
    """Normalise an answer as M4C's `EvalAIAnswerProcessor` does."""
    words = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return vqa_answer(one_line(words))


def _image_name(subset: str, number: int) -> str:
    return f"COCO_{subset}_{str(number).zfill(12)}.jpg"


def _questions_file(data: Path) -> Path:
    """Return the question file. Of the test archive, which holds test2015 and its part test-dev2015, the latter."""
    found = find_files(data, FILES, "VQAv2 questions")
    if TEST_DEV in [path.name for path in found]:
        found = [path for path in found if path.name != WHOLE_TEST]
    return only_file(found, data, "VQAv2 questions")


def _subset(content: Any, path: Path) -> str:
    subset = take(content, "data_subtype", str, str(path))
    if subset not in SUBSETS:
        raise DataError(f"{path}: data_subtype {subset!r}: expected {', '.join(SUBSETS)}; use the official file")
    return str(subset)


def _percent(points: Sequence[float]) -> float:
    return round(100 * sum(points) / len(points), 2)
