"""What every benchmark is: questions out of its official files, a pinned protocol, a submission file, a score."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from anyres_vlm.data.sources.paths import path_inside
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.evaluate.answers import Answered, read_json
from anyres_vlm.schema import ImageRef

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
SHORT_PROMPT = "<image>\n{question}" + SHORT_ANSWER
SHORT_ANSWER_TOKENS = 128  # new tokens at most: LLaVA's model_vqa_loader.py
LLAVA = "LLaVA-1.5 (haotian-liu/LLaVA"


@dataclass(frozen=True, slots=True)
class Question:
    """One question as the model gets it, behind its image. `id` is of the type that the official files have."""

    id: int | str
    image: ImageRef
    prompt: str


@dataclass(frozen=True, slots=True)
class Mark:
    """What one answer is worth, 0 to 1, beside question, truth, the picture's file and the kinds of question it is."""

    points: float
    answer: Answered
    question: str
    reference: str
    image: str
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scored:
    """A benchmark's result: `score` in percent as published tables have it, the official numbers, marks by question.

    Marks are in the order of the annotations.
    """

    score: float | None
    scores: Mapping[str, Any]
    marks: Mapping[str, Mark] = field(repr=False)


class Benchmark(Protocol):
    """One benchmark with its choices made. `protocol` says in words what is pinned: prompt, post-processing, scorer."""

    @property
    def name(self) -> str:
        """As on the command line."""
        ...

    @property
    def max_new_tokens(self) -> int:
        """The longest answer, in tokens."""
        ...

    @property
    def protocol(self) -> Mapping[str, str]:
        """What is pinned, by what it is about."""
        ...

    def questions(self, data: Path, images: Path | None, limit: int | None) -> list[Question]:
        """Of the official files in a folder, or of the file that is named; the first `limit` of each file."""
        ...

    def annotations(self, data: Path) -> list[Path]:
        """The files that hold the right answers; none where they are not published or nobody is to judge."""
        ...

    def submission(self, data: Path, answers: Sequence[tuple[Question, str]]) -> tuple[str, Any]:
        """The official format: the file's suffix, and the object of a .json or the objects of a .jsonl file."""
        ...

    def score(self, annotations: Sequence[Path], given: Sequence[Answered], partial: bool) -> Scored:
        """Score as the official script does; `partial` scores the questions that are answered and no others.

        Raises `DataError` for files of another form and for questions that are not answered exactly once.
        """
        ...


def find_files(data: Path, patterns: Sequence[str], wanted: str) -> list[Path]:
    """Files of the first pattern that has any, in the folder or in one directly below it; a file is itself.

    Raises `DataError` where there is none.
    """
    if data.is_file():
        return [data]
    if not data.exists():
        raise DataError(f"{data}: no such file or folder; expected {wanted}")
    for pattern in patterns:
        for depth in ("", "*/"):
            if found := sorted(path for path in data.glob(depth + pattern) if path.is_file()):
                return found
    raise DataError(f"{data}: no {wanted} in it ({', '.join(patterns)}); name its folder or the file itself")


def find_file(data: Path, patterns: Sequence[str], wanted: str) -> Path:
    """The one file of a pattern. Raises `UsageError` where there are several."""
    found = find_files(data, patterns, wanted)
    if len(found) > 1:
        names = ", ".join(str(path) for path in found)
        raise UsageError(f"{data}: several files could be the {wanted} ({names}): name one with --data")
    return found[0]


class ImageFolders:
    """Where a benchmark's pictures may lie: the folder that was named, or near its file in a folder of a usual name."""

    def __init__(self, file: Path, images: Path | None, names: Sequence[str]) -> None:
        roots = (images,) if images else (file.parent, file.parent.parent)
        self.folders = [root / name for root in roots for name in (*names, "images", ".")]

    def find(self, name: str, where: str) -> ImageRef:
        """A picture by its file's name; one that is in no folder is expected in the first."""
        paths = [path_inside(folder, name, where) for folder in self.folders]
        path = next((path for path in paths if os.path.exists(path)), paths[0])  # False for names too long
        return ImageRef(str(path), path)


def questions_by_id(path: Path) -> dict[str, Any]:
    """The entries of a file that is one object. Raises `DataError` for another."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected an object of questions by id, got {type(content).__name__}")
    return content


def take(entry: Any, key: str, kind: type, where: str) -> Any:
    """A value of an official file's object. Raises `DataError` for a missing one or one of another type."""
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        got = f"an object without {key!r}" if isinstance(entry, dict) and key not in entry else repr(value)[:40]
        raise DataError(f"{where}: expected {kind.__name__} under {key!r}, got {got}; use the official file")
    return value


def human_reference(answers: Sequence[str]) -> str:
    """People's answers as one line, the three most frequent with their number."""
    return ", ".join(f"{text} ({count})" for text, count in Counter(answers).most_common(3))


def percent(values: Sequence[float], digits: int = 2) -> float:
    """The mean in percent, rounded as the official scripts print it."""
    return float(f"{100.0 * (sum(values) / len(values)):.{digits}f}")
