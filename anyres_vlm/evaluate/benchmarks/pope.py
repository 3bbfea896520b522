"""POPE: object hallucination, by yes-or-no questions. Accuracy, precision, recall, F1 and share of yes by split."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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
    find_files,
    image_question,
    make_mark,
    percent,
    take,
)

FILES = ["coco_pope_*.json*", "*_pope_*.json*"]
# coco_pope_random.json, gqa_pope_random.json, aokvqa_pope_seem_random.json
FILE_NAME = re.compile(r"(.+?)_pope_(?:(?:\w+_)?(adversarial|popular|random)|(\w+))\.jsonl?")
LLAVA_OFFSETS = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}  # of the ids in llava_pope_test.jsonl
NEGATIONS = {"No", "not", "no"}


class POPE(Benchmark):
    """Object hallucination, one file for each split.

    Ids in the official files start at 1 in each split, so `question_id` is LLaVA's: the official id plus the split's
    offset.
    """

    name = "pope"
    max_new_tokens = SHORT_ANSWER_TOKENS
    protocol: Mapping[str, str] = {
        "prompt": SHORT_PROMPT,
        "post_processing": "first sentence; no with the word No, not or no in it, else yes",
        "scorer": f"{LLAVA}, eval_pope.py at 4241f08)",
    }

    def questions(self, data: Path, images: Path | None, limit: int | None) -> list[Question]:
        questions = []
        for path, entries in _read_splits(self.annotations(data)).values():
            folders = ImageFolders(data, path, images, ("val2014",))
            for number, (name, entry) in enumerate(list(entries.items())[:limit], start=1):
                where = f"{path}: question {number}"
                image = folders.find(take(entry, "image", str, where), where)
                questions.append(image_question(int(name), image, take(entry, "text", str, where) + SHORT_ANSWER))
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
        splits: dict[str, dict[str, Any]] = {}
        for split, (path, entries) in _read_splits(annotations).items():
            splits[split] = entries
            labels |= {name: _label(entry, f"{path}: question {name}") for name, entry in entries.items()}
        found = match(given, labels, annotations[0], partial, _ids(given, splits))
        marks: dict[str, Mark] = {}
        rates: dict[str, dict[str, float | None]] = {}
        for split, entries in splits.items():
            said = {name: yes_or_no(found[name].text) == "yes" for name in entries if name in found}
            for name, yes in said.items():
                question, truth, image = (str(entries[name].get(key, "")) for key in ("text", "label", "image"))
                marks[name] = make_mark(float(yes == labels[name]), found[name], question, truth, image, (split,))
            if said:
                rates[split] = yes_no_rates([(yes, labels[name]) for name, yes in said.items()])
        f1 = [of["f1"] for of in rates.values() if of["f1"] is not None]
        return Scored(percent(f1) if len(f1) == len(rates) else None, rates, marks)


def yes_or_no(text: str) -> str:
    """Reduce an answer of any length to yes or no by LLaVA's rule, which splits words at single spaces only."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if NEGATIONS.intersection(words) else "yes"


def yes_no_rates(pairs: Sequence[tuple[bool, bool]]) -> dict[str, float | None]:
    """Return the rates of (said, true) pairs; None for a division by zero, which stops the official script."""
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


def dataset_and_split(name: str) -> tuple[str, str]:
    """Return the dataset and the split that a file name states, such as gqa and random; ("", stem) for other names."""
    found = FILE_NAME.fullmatch(name)
    return (found[1], found[2] or found[3]) if found else ("", Path(name).stem)


def _read_splits(paths: Sequence[Path]) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Return each split's file and its entries by LLaVA's question id; other splits than LLaVA's keep their ids.

    Raises `UsageError` for files of several datasets, `DataError` for ids that occur twice.
    """
    datasets = list(dict.fromkeys(dataset_and_split(path.name)[0] for path in paths))
    if len(datasets) > 1:
        raise UsageError(
            f"{', '.join(path.name for path in paths)}: POPE files of several datasets ({', '.join(datasets)}): "
            "name the folder or the files of one"
        )
    splits: dict[str, tuple[Path, dict[str, Any]]] = {}
    owners: dict[str, Path] = {}
    for path in paths:
        split = dataset_and_split(path.name)[1]
        if split in splits:
            raise UsageError(f"{splits[split][0]} and {path}: both are the split {split}: name the folder of one")
        content = read_json(path)
        entries = entries_by_id(content if isinstance(content, list) else [content], path, "question")
        named = {str(int(name) + LLAVA_OFFSETS.get(split, 0)): entry for name, entry in entries.items()}
        if twice := next((name for name in named if name in owners), None):
            raise DataError(
                f"{path}: question {twice} is also in {owners[twice]}; ids may only repeat in splits called "
                f"{', '.join(LLAVA_OFFSETS)}: rename the files, or name one with --data"
            )
        owners |= dict.fromkeys(named, path)
        splits[split] = path, named
    return splits


def _label(entry: Any, where: str) -> bool:
    label = take(entry, "label", str, where)
    if label not in ("yes", "no"):
        raise DataError(f"{where}: expected the label yes or no, got {label!r}")
    return bool(label == "yes")


def _ids(given: Sequence[Answered], splits: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return LLaVA's id of each answer: its own, or from its `category`, its file's only split, or its position."""
    everything = [name for names in splits.values() for name in names]
    if all(answer.id is None for answer in given):
        if len(everything) != len(given):
            raise DataError(
                f"{len(given)} answers without 'question_id' for {len(everything)} questions: write one line each"
            )
        return everything
    known, anywhere = {split: set(names) for split, names in splits.items()}, set(everything)
    ids = []
    for answer in given:
        if answer.id is None:
            raise DataError("some answers have a 'question_id' and some have none: write one in each line")
        split = answer.category or (next(iter(splits)) if len(splits) == 1 else "")
        is_official = answer.id.isdecimal() and answer.id not in known.get(split, anywhere)
        ids.append(str(int(answer.id) + LLAVA_OFFSETS.get(split, 0)) if is_official else answer.id)
    return ids
