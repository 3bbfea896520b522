"""VQAv2 and TextVQA: soft accuracy, and the normalisation of answers that both evaluations use.

An answer gets the mean over the ten subsets of nine human answers of min(1, matches / 3). The normalisation follows
GT-Vision-Lab/VQA, vqaEval.py at a013f00, and the answer processor of MMF's M4C evaluator, which LLaVA uses for TextVQA
and for VQAv2 submissions. Their bugs are kept, so that scores are equal.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
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
    find_files,
    human_reference,
    image_question,
    make_mark,
    mean_by,
    only_file,
    percent,
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
        found = match(given, wanted, path, partial)
        marks: dict[str, Mark] = {}
        typed: list[tuple[str, str, float]] = []
        for name, entry in wanted.items():
            if name not in found:
                continue
            where = f"{path}: question {name}"
            answer = found[name]
            text = evalai_answer(answer.text) if answer.raw else answer.text
            human = take(entry, "answers", list, where)
            points = soft_accuracy(text, human, where)
            kinds = take(entry, "answer_type", str, where), take(entry, "question_type", str, where)
            reference = human_reference([said["answer"] for said in human])
            image = _image_name(subset, entry.get("image_id", 0))
            labels = f"answer: {kinds[0]}", f"question: {kinds[1]}"
            marks[name] = make_mark(points, answer, "", reference, image, labels)  # the questions are in another file
            typed.append((*kinds, points))
        overall = _percent([mark.points for mark in marks.values()])
        types = {
            "perAnswerType": mean_by(((kind, points) for kind, _, points in typed), _percent),
            "perQuestionType": mean_by(((kind, points) for _, kind, points in typed), _percent),
        }
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


TEXTVQA_FILES = ["TextVQA_0.5.1_val.json", "TextVQA_0*.json", "*TextVQA_val*.json"]
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
        path = _textvqa_file(data)
        if self.ocr_tokens is None:
            raise UsageError(
                "textvqa: OCR tokens in the prompt raise the score by points: choose --ocr-tokens or --no-ocr-tokens"
            )
        entries = _read_textvqa(path)
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
        path = _textvqa_file(data)
        return [path] if any("answers" in entry for entry in _read_textvqa(path).values()) else []

    def submission(self, data: Path, answers: Sequence[tuple[Question, str]]) -> tuple[str, Any]:
        return ".json", [{"question_id": question.id, "answer": text} for question, text in answers]

    def score(self, annotations: Sequence[Path], given: Sequence[Answered], partial: bool) -> Scored:
        (path,) = annotations
        entries = _read_textvqa(path)
        found = match(given, entries, path, partial, _ids(given, entries))
        marks: dict[str, Mark] = {}
        for name, answer in found.items():  # in the order of the answers, as the official sum is
            where = f"{path}: question {name}"
            human = take(entries[name], "answers", list, where)
            points = m4c_accuracy(answer.text, human, where)
            question, image = (str(entries[name].get(key, "")) for key in ("question", "image_id"))
            marks[name] = make_mark(points, answer, question, human_reference(human), f"{image}.jpg")
        accuracy = percent([mark.points for mark in marks.values()])
        return Scored(accuracy, {"accuracy": accuracy}, marks)


def m4c_accuracy(text: str, human: Sequence[Any], where: str) -> float:
    """Return the points of one answer. Ten human answers are expected, as in the official evaluator."""
    if len(human) != NUM_HUMAN or not all(isinstance(answer, str) for answer in human):
        raise DataError(f"{where}: expected {NUM_HUMAN} human answers as text, got {len(human)}: use the official file")
    normal = [evalai_answer(answer) for answer in human]
    said = evalai_answer(text)
    matching = Counter(normal)[said]
    subsets = [min(1, (matching - (left_out == said)) / 3) for left_out in normal]
    return sum(subsets) / len(subsets)


def _textvqa_file(data: Path) -> Path:
    return find_file(data, TEXTVQA_FILES, "TextVQA questions")


def _read_textvqa(path: Path) -> dict[str, Any]:
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
