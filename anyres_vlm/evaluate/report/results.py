"""Result files: written by `anyres eval` and `score`, and read back together with those of `probe`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from anyres_vlm.errors import DataError
from anyres_vlm.evaluate.answers import read_json
from anyres_vlm.evaluate.benchmarks.base import Scored
from anyres_vlm.evaluate.benchmarks.heldout import BLIND, Heldout
from anyres_vlm.files import replacing
from anyres_vlm.geometry import Tiling

EXPECTED = "expected a file written by anyres eval, score --out or probe --out"


@dataclass(frozen=True, slots=True)
class Answer:
    """One answered question. Everything but the points is empty if it was not recorded."""

    points: float
    question: str = ""
    image: str = ""
    text: str = ""
    reference: str = ""
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """One benchmark's result. `score` is in percent; `answers` are by question; `label` identifies the run."""

    benchmark: str
    label: str
    model: str
    score: float | None
    scores: Mapping[str, Any]
    protocol: Mapping[str, str]
    questions: int
    answers: Mapping[str, Answer]
    limit: int | None = None
    unasked: int = 0
    tiling: Tiling | None = None
    annotations: tuple[str, ...] = ()

    @property
    def judged_by(self) -> str:
        """The models that graded the answers, by the names in their replies."""
        names = self.scores.get("judged_by")
        return ", ".join(map(str, names)) if isinstance(names, list) else ""

    @property
    def blind(self) -> bool:
        """Whether each question was shown the image of another."""
        return self.protocol.get("image_shown") == BLIND


@dataclass(frozen=True)
class Probes:
    """One run of the probes: scores and replies by probe."""

    label: str
    model: str
    count: int
    scores: Mapping[str, Any]
    replies: Mapping[str, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class _ResultFile:
    benchmark: str
    score: float | None
    scores: dict[str, Any]
    questions: int
    protocol: dict[str, str]
    points: dict[str, float]
    model: str = ""
    limit: int | None = None
    unasked: tuple[Any, ...] = ()
    tiling: Tiling | None = None
    annotations: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Mark:
    question_id: str
    question: str
    image: str
    text: str
    reference: str
    kinds: tuple[str, ...]
    points: float


@dataclass(frozen=True)
class _HeldoutAnswer:
    id: str
    task: str
    question: str
    expected: str
    answer: str
    correct: bool
    image: str = ""


@dataclass(frozen=True)
class _HeldoutFile:  # an earlier format of results of held-out questions
    answers: list[_HeldoutAnswer]
    model: str = ""
    limit: int | None = None
    blind: bool = False
    tiling: Tiling | None = None


@dataclass(frozen=True)
class _ProbesFile:
    scores: dict[str, Any]
    replies: dict[str, list[dict[str, Any]]]
    model: str = ""
    count: int = 0


def write_result(folder: Path, title: str, result: Mapping[str, Any], scored: Scored) -> None:
    """Write `TITLE.json` with the points of every question, and `TITLE.marks.jsonl` with questions and answers."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {
            "question_id": question,
            "question": mark.answer.prompt or mark.question,
            "image": mark.answer.image or mark.image,
            "text": mark.answer.text,
            "reference": mark.reference,
            "kinds": mark.kinds,
            "points": mark.points,
        }
        for question, mark in scored.marks.items()
    ]
    with replacing(folder / f"{title}.marks.jsonl") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    content = {**result, "points": {question: mark.points for question, mark in scored.marks.items()}}
    with replacing(folder / f"{title}.json") as file:
        file.write(json.dumps(content, indent=1) + "\n")


def read_runs(runs: Sequence[Path]) -> tuple[list[Result], list[Probes]]:
    """Read the results of folders and files, in the order given. Raises `DataError` for a run without any.

    In a folder without results, those in folders called `eval` below it count.
    """
    files = [(run, file) for run in dict.fromkeys(runs) for file in _files(run)]
    labels = _labels([file.with_suffix("") if run == file else file.parent for run, file in files])
    read = [_read(file, label) for (_, file), label in zip(files, labels, strict=True)]
    seen = Counter((result.benchmark, result.label) for result in read if isinstance(result, Result))
    results = [
        replace(result, label=f"{result.label}/{file.stem}") if seen[result.benchmark, result.label] > 1 else result
        for result, (_, file) in zip(read, files, strict=True)
        if isinstance(result, Result)
    ]
    return results, [probes for probes in read if isinstance(probes, Probes)]


def _files(run: Path) -> list[Path]:
    if not run.exists():
        raise DataError(f"{run}: no such file or folder; {EXPECTED}")
    if run.is_file():
        return [run]
    for pattern in ("*.json", "**/eval/*.json"):
        if found := [path for path in sorted(run.glob(pattern)) if path.is_file() and _kind(read_json(path))]:
            return found
    raise DataError(f"{run}: no result in it; {EXPECTED}")


def _labels(places: Sequence[Path]) -> list[str]:
    """Shorten each path by the folders that all paths begin or end with."""
    parts = {place: list(place.parts) for place in places}
    if len(parts) > 1:
        for end in (0, -1):
            while min(map(len, parts.values())) > 1 and len({names[end] for names in parts.values()}) == 1:
                for names in parts.values():
                    del names[end]
    return [str(Path(*parts[place])) for place in places]


def _kind(content: Any) -> type[_ResultFile | _HeldoutFile | _ProbesFile] | None:
    for kind, keys in (
        (_ResultFile, {"benchmark", "scores"}),
        (_HeldoutFile, {"accuracy", "answers"}),
        (_ProbesFile, {"scores", "replies"}),
    ):
        if isinstance(content, dict) and keys <= content.keys():
            return kind
    return None


def _read(path: Path, label: str) -> Result | Probes:
    content = read_json(path)
    kind = _kind(content)
    if kind is None:
        raise DataError(f"{path}: not a result; {EXPECTED}")
    try:
        found = TypeAdapter(kind).validate_python(content)
        marks = _marks(path, found) if isinstance(found, _ResultFile) else {}
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"]))
        raise DataError(f"{path}: {place or 'content'}: {fault['msg']}; {EXPECTED}") from None
    if isinstance(found, _ProbesFile):
        return Probes(label, found.model, found.count, found.scores, found.replies)
    if isinstance(found, _HeldoutFile):
        return _heldout(path, label, found)
    return Result(
        found.benchmark,
        label,
        found.model,
        found.score,
        found.scores,
        found.protocol,
        found.questions,
        marks,
        found.limit,
        len(found.unasked),
        found.tiling,
        found.annotations,
    )


def _heldout(path: Path, label: str, found: _HeldoutFile) -> Result:
    answers = {
        one.id: Answer(float(one.correct), one.question, one.image, one.answer, one.expected, (one.task,))
        for one in found.answers
    }
    if not answers or len(answers) < len(found.answers):
        raise DataError(f"{path}: {len(found.answers)} answers to {len(answers)} questions: expected one answer each")
    score = 100 * sum(answer.points for answer in answers.values()) / len(answers)
    protocol = Heldout(swap_images=found.blind).protocol
    return Result(
        Heldout.name,
        label,
        found.model,
        round(score, 2),
        {},
        protocol,
        len(answers),
        answers,
        found.limit,
        tiling=found.tiling,
    )


def _marks(path: Path, found: _ResultFile) -> dict[str, Answer]:
    """Read the marks of a result; without their file only the points are known."""
    marks_file = path.with_name(f"{path.stem}.marks.jsonl")
    bare = {question: Answer(points) for question, points in found.points.items()}
    if not marks_file.exists() or not bare:
        return bare
    content = read_json(marks_file)
    lines = TypeAdapter(list[_Mark]).validate_python(content if isinstance(content, list) else [content])
    marks = {
        line.question_id: Answer(line.points, line.question, line.image, line.text, line.reference, line.kinds)
        for line in lines
    }
    if {question: mark.points for question, mark in marks.items()} != found.points:
        raise DataError(f"{marks_file}: belongs to another result than {path.name}: score again, or delete the marks")
    return marks
