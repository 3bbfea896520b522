"""POPE: is there such an object? Accuracy, precision, recall, F1 and the share of yes, for each way of asking."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anyres_vlm.errors import DataError
from anyres_vlm.evaluate.answers import Answered, match, read_json
from anyres_vlm.evaluate.benchmark import (
    LLAVA,
    SHORT_ANSWER,
    SHORT_ANSWER_TOKENS,
    SHORT_PROMPT,
    ImageFolders,
    Mark,
    Question,
    Scored,
    find_files,
    percent,
    take,
)

FILES = ["coco_pope_*.json*", "*_pope_*.json*"]
SPLIT = re.compile(r"_pope_(\w+)\.jsonl?$")
LLAVA_OFFSETS = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}  # of the ids in llava_pope_test.jsonl
NEGATIONS = {"No", "not", "no"}


class POPE:
    """Object hallucination. `question_id` is LLaVA's: the official one, from 1 in each file, and the split's offset."""

    name = "pope"
    max_new_tokens = SHORT_ANSWER_TOKENS
    protocol: Mapping[str, str] = {
        "prompt": SHORT_PROMPT,
        "post_processing": "first sentence; no with the word No, not or no in it, else yes",
        "scorer": f"{LLAVA}, eval_pope.py at 4241f08)",
    }

    def questions(self, data: Path, images: Path | None, limit: int | None) -> list[Question]:
        questions = []
        for path in self.annotations(data):
            folders = ImageFolders(path, images, ("val2014",))
            for number, (name, entry) in enumerate(list(_read(path).items())[:limit], start=1):
                where = f"{path}: question {number}"
                image = folders.find(take(entry, "image", str, where), where)
                questions.append(Question(int(name), image, take(entry, "text", str, where) + SHORT_ANSWER))
        return questions

    def annotations(self, data: Path) -> list[Path]:
        return find_files(data, FILES, "POPE questions")

    def submission(self, data: Path, answers: Sequence[tuple[Question, str]]) -> tuple[str, Any]:
        return ".jsonl", [
            {"question_id": question.id, "question": question.prompt.split("\n")[0], "answer": yes_or_no(text)}
            for question, text in answers
        ]

    def score(self, annotations: Sequence[Path], given: Sequence[Answered], partial: bool) -> Scored:
        labels: dict[str, bool] = {}
        shown: dict[str, Any] = {}
        splits: dict[str, list[str]] = {}
        for path in annotations:
            entries = _read(path)
            splits[_split(path)] = list(entries)
            labels |= {name: _label(entry, f"{path}: question {name}") for name, entry in entries.items()}
            shown |= entries
        ids = _ids(given, splits)
        found = match(given, set(ids) & set(labels) if partial else labels, ids)
        said = {name: yes_or_no(answer.text) == "yes" for name, answer in found.items()}
        marks = {
            name: Mark(
                float(said[name] == labels[name]),
                found[name],
                str(shown[name].get("text", "")),
                shown[name]["label"],
                str(shown[name].get("image", "")),
                (split,),
            )
            for split, names in splits.items()
            for name in names
            if name in said
        }
        by_split = {
            split: yes_no_rates([(said[name], labels[name]) for name in names if name in said])
            for split, names in splits.items()
            if any(name in said for name in names)
        }
        if not by_split:
            raise DataError(f"{annotations[0]}: no questions in it")
        f1 = [rates["f1"] for rates in by_split.values()]
        mean = None if None in f1 else percent([float(value) for value in f1 if value is not None])
        return Scored(mean, by_split, marks)


def yes_or_no(text: str) -> str:
    """What an answer of any length says, by LLaVA's rule: words are split at single spaces alone."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if NEGATIONS.intersection(words) else "yes"


def yes_no_rates(pairs: Sequence[tuple[bool, bool]]) -> dict[str, float | None]:
    """Of (said, true); None where nothing can be divided, which stops the official script."""
    hits = sum(said and label for said, label in pairs)
    yes, positive = sum(said for said, _ in pairs), sum(label for _, label in pairs)
    precision = hits / yes if yes else None
    recall = hits / positive if positive else None
    f1 = 2 * precision * recall / (precision + recall) if precision and recall else None
    return {
        "accuracy": sum(said == label for said, label in pairs) / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "yes_ratio": yes / len(pairs),
    }


def _split(path: Path) -> str:
    found = SPLIT.search(path.name)
    return found[1] if found else path.stem


def _read(path: Path) -> dict[str, Any]:
    """Entries by LLaVA's question id; a split that LLaVA does not have keeps the official one."""
    content = read_json(path)
    offset = LLAVA_OFFSETS.get(_split(path), 0)
    entries = {}
    for number, entry in enumerate(content if isinstance(content, list) else [content], start=1):
        name = str(take(entry, "question_id", int, f"{path}: question {number}") + offset)
        if name in entries:
            raise DataError(f"{path}: question {number} has the id of an earlier one; use the official file")
        entries[name] = entry
    return entries


def _label(entry: Any, where: str) -> bool:
    label = take(entry, "label", str, where)
    if label not in ("yes", "no"):
        raise DataError(f"{where}: expected the label yes or no, got {label!r}")
    return bool(label == "yes")


def _ids(given: Sequence[Answered], splits: Mapping[str, Sequence[str]]) -> list[str]:
    """LLaVA's id of each answer: as it is, from its `category`, from its file's only split, or by its place."""
    everything = [name for names in splits.values() for name in names]
    if all(answer.id is None for answer in given):
        if len(everything) != len(given):
            raise DataError(
                f"{len(given)} answers without 'question_id' for {len(everything)} questions: one line each"
            )
        return everything
    ids = []
    for answer in given:
        if answer.id is None:
            raise DataError("some answers have a 'question_id' and some have none: write one in each line")
        split = answer.category or (next(iter(splits)) if len(splits) == 1 else "")
        known = splits.get(split, everything)
        is_official = answer.id not in known and answer.id.isdecimal()
        ids.append(str(int(answer.id) + LLAVA_OFFSETS.get(split, 0)) if is_official else answer.id)
    return ids
