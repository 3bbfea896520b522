"""Held-out questions with short exact answers, scored by task; with swapped images they give the blind baseline."""

from __future__ import annotations

import json
import string
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev

from anyres_vlm.data.sources import read_records
from anyres_vlm.errors import DataError
from anyres_vlm.evaluate.answers import Answered, match
from anyres_vlm.evaluate.benchmarks.base import Benchmark, Mark, Question, Scored, image_path, make_mark, percent
from anyres_vlm.schema import Record

BLIND = "another question's (blind)"


@dataclass(frozen=True)
class Heldout(Benchmark):
    """The first question of each record of a dataset. `swap_images` shows each question the image of another."""

    swap_images: bool = False
    name = "heldout"
    max_new_tokens = 24

    @property
    def protocol(self) -> Mapping[str, str]:
        return {
            "prompt": "the record's first question",
            "scorer": "exact match except for case and outer punctuation",
            "image_shown": BLIND if self.swap_images else "its own",
        }

    def questions(self, data: Path, images: Path | None, limit: int | None) -> list[Question]:
        records = _read(data, images)[:limit]
        if self.swap_images:
            records = swap_images(records)
        return [Question(record.id, record.turns[0].text, record.images, record.system) for record in records]

    def annotations(self, data: Path) -> list[Path]:
        return [data]

    def submission(self, data: Path, answers: Sequence[tuple[Question, str]]) -> None:
        return None

    def score(self, annotations: Sequence[Path], given: Sequence[Answered], partial: bool) -> Scored:
        (data,) = annotations
        records = {record.id: record for record in _read(data, None)}
        found = match(given, records, data, partial)
        marks: dict[str, Mark] = {}
        by_task: defaultdict[str, list[bool]] = defaultdict(list)
        for name, answer in found.items():
            record = records[name]
            question, truth = (turn.text for turn in record.turns[:2])
            is_correct = normalise(answer.text) == normalise(truth)
            shown = ", ".join(map(image_path, record.images))
            marks[name] = make_mark(float(is_correct), answer, question, truth, shown, (record.task,))
            by_task[record.task].append(is_correct)
            by_task["all"].append(is_correct)
        shares = {task: sum(hits) / len(hits) for task, hits in by_task.items()}
        return Scored(percent(by_task["all"]), shares, marks)


def _read(data: Path, images: Path | None) -> list[Record]:
    """Read all records; an id that occurs again gets its number appended, so that ids are unique."""
    seen: Counter[str] = Counter()
    records = []
    for record in read_records(data, images):
        seen[record.id] += 1
        records.append(replace(record, id=f"{record.id}#{seen[record.id]}") if seen[record.id] > 1 else record)
    return records


def normalise(text: str) -> str:
    """Lower the case, use single spaces, strip punctuation; `$` and signs inside numbers stay."""
    return " ".join(text.lower().split()).strip(string.punctuation.replace("$", "") + " ")


def swap_images(records: Sequence[Record]) -> list[Record]:
    """Give each question the image of the next question of its task; a model then answers blind."""
    by_task: defaultdict[str, list[int]] = defaultdict(list)
    for index, record in enumerate(records):
        by_task[record.task].append(index)
    swapped = list(records)
    for indices in by_task.values():
        if len(indices) < 2:
            raise DataError(f"task {records[indices[0]].task!r} has one question: swapping images needs at least two")
        for index, other in zip(indices, [*indices[1:], indices[0]], strict=True):
            swapped[index] = replace(records[index], images=records[other].images)
    return swapped


def read_correct(path: Path) -> dict[str, bool]:
    """Return by question whether an earlier run answered it correctly. Raises `DataError` for any other file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if "answers" in content:  # an earlier format
            return {answer["id"]: bool(answer["correct"]) for answer in content["answers"]}
        return {question: points == 1 for question, points in content["points"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: expected a result of anyres eval heldout --out ({error})") from None


def check_same_questions(questions: Collection[str], others: Collection[str]) -> None:
    """Raise `DataError` unless two runs have the same questions, at least two."""
    if len(questions) < 2 or set(questions) != set(others):
        raise DataError(
            f"the other run answered {len(others)} questions, not the same {len(questions)}: compare runs on the same "
            "data"
        )


def gain(correct: Mapping[str, bool], others: Mapping[str, bool]) -> tuple[float, float]:
    """Return the mean gain over another run on the same questions, and half of its 95% interval.

    Both say by question whether the answer was correct. Raises `DataError` if the questions differ.
    """
    check_same_questions(correct, others)
    differences = [correct[question] - others[question] for question in correct]
    return fmean(differences), 1.96 * stdev(differences) / len(differences) ** 0.5
