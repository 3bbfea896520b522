"""Held-out questions with short exact answers, by task, beside the blind baseline."""

from __future__ import annotations

import json
import string
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev

from anyres_vlm.errors import DataError
from anyres_vlm.evaluate.marks import image_path
from anyres_vlm.inference import BATCH_TOKENS, Assistant, Conversation
from anyres_vlm.model.generation import Decoding
from anyres_vlm.schema import Record

MAX_NEW_TOKENS = 24


@dataclass(frozen=True)
class Result:
    """One question, the right answer and the model's."""

    id: str
    task: str
    question: str
    expected: str
    answer: str
    image: str = ""

    @property
    def correct(self) -> bool:
        """Equal but for case, outer punctuation and white space."""
        return normalise(self.answer) == normalise(self.expected)


def normalise(text: str) -> str:
    """Lower case, single spaces, no punctuation at the ends; `$` and signs inside numbers stay."""
    return " ".join(text.lower().split()).strip(string.punctuation.replace("$", "") + " ")


def swap_images(records: Sequence[Record]) -> list[Record]:
    """The same questions, each about the picture of the next question of its task: what a blind model can know."""
    by_task: defaultdict[str, list[int]] = defaultdict(list)
    for index, record in enumerate(records):
        by_task[record.task].append(index)
    swapped = list(records)
    for indices in by_task.values():
        if len(indices) < 2:
            raise DataError(f"task {records[indices[0]].task!r} has one question: swapping images needs at least two")
        for index, other in zip(indices, [*indices[1:], indices[0]], strict=True):
            record = records[index]
            swapped[index] = replace(record, images=records[other].images)
    return swapped


def ask_all(
    assistant: Assistant, records: Sequence[Record], progress: Callable[[int], None], batch_tokens: int = BATCH_TOKENS
) -> list[Result]:
    """Ask each record's first question, greedily, in batches of so many tokens."""
    asked = [Conversation(record.turns[:1], record.images, record.system) for record in records]
    answers = assistant.answer_many(asked, Decoding(MAX_NEW_TOKENS), batch_tokens, progress)
    return [
        Result(
            record.id,
            record.task,
            record.turns[0].text,
            record.turns[1].text,
            answer.text,
            ", ".join(map(image_path, record.images)),
        )
        for record, answer in zip(records, answers, strict=True)
    ]


def read_correct(path: Path) -> dict[str, bool]:
    """What was right in the answers of an earlier run, by question's id. Raises `DataError` for any other file."""
    try:
        answers = json.loads(path.read_text(encoding="utf-8"))["answers"]
        return {answer["id"]: bool(answer["correct"]) for answer in answers}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: expected the answers that anyres eval heldout --out has written ({error})") from None


def gain(results: Sequence[Result], others: Mapping[str, bool]) -> tuple[float, float]:
    """How much more of the same questions are right than in another run, and half the 95% interval of that.

    `others` says by question's id what was right there. Raises `DataError` where the questions are not the same.
    """
    ids = [result.id for result in results]
    if len(ids) < 2 or sorted(ids) != sorted(others):
        raise DataError(
            f"the other run answered {len(others)} questions, not the same {len(ids)}: compare the same data"
        )
    differences = [result.correct - others[result.id] for result in results]
    return fmean(differences), 1.96 * stdev(differences) / len(differences) ** 0.5


def accuracy_by_task(results: Sequence[Result]) -> dict[str, float]:
    """Share of right answers of each task, and of all questions under `all`."""
    by_task: defaultdict[str, list[bool]] = defaultdict(list)
    for result in results:
        by_task[result.task].append(result.correct)
        by_task["all"].append(result.correct)
    return {task: sum(hits) / len(hits) for task, hits in by_task.items()}
