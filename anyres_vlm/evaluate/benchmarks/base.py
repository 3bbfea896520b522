"""What a benchmark is: questions from its official files, a pinned protocol, a submission format and a scorer."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from anyres_vlm.data.sources.paths import path_inside
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.evaluate.answers import Answered, as_id, read_json
from anyres_vlm.schema import IMAGE_TOKEN, ImageRef

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
SHORT_PROMPT = "<image>\n{question}" + SHORT_ANSWER
SHORT_ANSWER_TOKENS = 128  # new tokens at most: LLaVA's model_vqa_loader.py
LLAVA = "LLaVA-1.5 (haotian-liu/LLaVA"
SEARCH_DEPTHS = ("", "*/", "*/*/", "*/*/*/")  # POPE's repository has output/seem/gqa/


@dataclass(frozen=True, slots=True)
class Question:
    """One question. `id` has the type of the official files; `turn` is the user's turn, with its `<image>`."""

    id: int | str
    turn: str
    images: tuple[ImageRef, ...]
    system: str = ""

    @property
    def prompt(self) -> str:
        """The turn without the image in front of it."""
        return self.turn.removeprefix(f"{IMAGE_TOKEN}\n")


def image_question(name: int | str, image: ImageRef, prompt: str) -> Question:
    """Return a question about one image, which comes before the prompt."""
    return Question(name, f"{IMAGE_TOKEN}\n{prompt}", (image,))


@dataclass(frozen=True, slots=True)
class Mark:
    """One answered question with its points, 0 to 1. Everything but the points is empty if it was not recorded."""

    points: float
    question: str = ""
    image: str = ""
    text: str = ""
    reference: str = ""
    kinds: tuple[str, ...] = ()


def make_mark(
    points: float, answer: Answered, question: str, reference: str, image: str, kinds: tuple[str, ...] = ()
) -> Mark:
    """Return the mark of an answer; the prompt and image recorded with the answer come before the annotations'."""
    return Mark(points, answer.prompt or question, answer.image or image, answer.text, reference, kinds)


@dataclass(frozen=True)
class Scored:
    """A benchmark's result: `score` in percent as in published tables, the official numbers, and marks by question.

    Marks are in the order of the annotations.
    """

    score: float | None
    scores: Mapping[str, Any]
    marks: Mapping[str, Mark] = field(repr=False)


class Benchmark(ABC):
    """One benchmark with its options set."""

    name: ClassVar[str]  # on the command line
    max_new_tokens: ClassVar[int]  # length limit of an answer

    @property
    @abstractmethod
    def protocol(self) -> Mapping[str, str]:
        """What is pinned, in words: prompt, post-processing, scorer."""

    @abstractmethod
    def questions(self, data: Path, images: Path | None, limit: int | None) -> list[Question]:
        """Return the questions of the official files in a folder, or of the file named; the first `limit` of each."""

    @abstractmethod
    def annotations(self, data: Path) -> list[Path]:
        """Return the files with the right answers; none where they are not published, or where no judge is set.

        Raises `DataError` if they are published but missing.
        """

    @abstractmethod
    def submission(self, data: Path, answers: Sequence[tuple[Question, str]]) -> tuple[str, Any] | None:
        """Return the official format: a file suffix, and the object of a .json or the objects of a .jsonl file."""

    @abstractmethod
    def score(self, annotations: Sequence[Path], given: Sequence[Answered], partial: bool) -> Scored:
        """Score as the official script does; `partial` scores only the questions that have an answer.

        Raises `DataError` for files in another format and for questions not answered exactly once.
        """

    def check_annotations(self, annotations: Sequence[Path], questions: Sequence[Question], partial: bool) -> None:
        """Raise `DataError` unless the annotations can score answers to these questions."""
        self.score(annotations, [Answered(str(question.id), "", raw=True) for question in questions], partial)


def find_files(data: Path, patterns: Sequence[str], wanted: str) -> list[Path]:
    """Return the files of the first pattern that matches, in a folder or up to three levels below; or the file itself.

    Raises `DataError` if there is none.
    """
    if data.is_file():
        return [data]
    if not data.exists():
        raise DataError(f"{data}: no such file or folder; expected {wanted}")
    for pattern in patterns:
        for depth in SEARCH_DEPTHS:
            paths = (path for path in data.glob(depth + pattern) if path.is_file())
            # Not ._mm-vet.json, which macOS adds to archives.
            if found := [path for path in paths if not any(p[0] == "." for p in path.relative_to(data).parts)]:
                return sorted(found)
    raise DataError(f"{data}: no {wanted} in it ({', '.join(patterns)}); name its folder or the file itself")


def find_file(data: Path, patterns: Sequence[str], wanted: str) -> Path:
    """Return the only file of a pattern. Raises `UsageError` if there are several."""
    return only_file(find_files(data, patterns, wanted), data, wanted)


def only_file(found: Sequence[Path], data: Path, wanted: str) -> Path:
    """Return the only one of the files found. Raises `UsageError` if there are several."""
    if len(found) > 1:
        names = ", ".join(str(path) for path in found)
        raise UsageError(f"{data}: several files could be the {wanted} ({names}): name one with --data")
    return found[0]


class ImageFolders:
    """Where a benchmark's images may be: the folder named, or a folder with a usual name near the question file."""

    def __init__(self, data: Path, file: Path, images: Path | None, names: Sequence[str]) -> None:
        """`data` is the folder in which `file` was found, or `file` itself."""
        near = [file.parent, file.parent.parent]
        if data in file.parents:
            near += file.parents[: file.parents.index(data) + 1]
        roots = [images] if images else list(dict.fromkeys(near))
        self.folders = [root / name for root in roots for name in (*names, "images", ".")]

    def find(self, name: str, where: str) -> ImageRef:
        """Return an image by its file name; one found in no folder is expected in the first."""
        paths = (path_inside(folder, name, where) for folder in self.folders)  # lazy: there are 107,394 questions
        found = next((path for path in paths if os.path.exists(path)), None)  # False for names that are too long
        path = found or path_inside(self.folders[0], name, where)
        return ImageRef(str(path), path)


def entries_by_id(entries: Sequence[Any], path: Path, what: str) -> dict[str, Any]:
    """Return a file's entries by `question_id`. Raises `DataError` for an entry without one or for a repeated id."""
    found: dict[str, Any] = {}
    for number, entry in enumerate(entries, start=1):
        name = as_id(take(entry, "question_id", int, f"{path}: {what} {number}"), "")
        if name in found:
            raise DataError(f"{path}: {what} {number} repeats the question_id {name}; use the official file")
        found[name] = entry
    return found


def questions_by_id(path: Path) -> dict[str, Any]:
    """Return the entries of a file that is one object. Raises `DataError` for anything else."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected an object of questions by id, got {type(content).__name__}")
    return content


def take(entry: Any, key: str, kind: type, where: str) -> Any:
    """Return a value of an official file's object. Raises `DataError` if it is missing or has another type."""
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        got = f"an object without {key!r}" if isinstance(entry, dict) and key not in entry else repr(value)[:40]
        raise DataError(f"{where}: expected {kind.__name__} under {key!r}, got {got}; use the official file")
    return value


def image_path(ref: ImageRef) -> str:
    """Return the absolute path of an image that is a file of its own, else its name."""
    is_file = ref.path is not None and ref.offset == 0 and ref.length is None
    return str(ref.path.absolute()) if is_file and ref.path else ref.name


def human_reference(answers: Sequence[str]) -> str:
    """Return human answers on one line, the three most frequent with their counts."""
    return ", ".join(f"{text} ({count})" for text, count in Counter(answers).most_common(3))


def mean_by(values: Iterable[tuple[str, float]], mean: Callable[[Sequence[float]], float]) -> dict[str, float]:
    """Return the mean of the values of each label, sorted by label."""
    groups: defaultdict[str, list[float]] = defaultdict(list)
    for label, value in values:
        groups[label].append(value)
    return {label: mean(groups[label]) for label in sorted(groups)}


def percent(values: Sequence[float]) -> float:
    """Return the mean in percent, rounded as the official scripts print it."""
    return float(f"{100.0 * (sum(values) / len(values)):.2f}")
