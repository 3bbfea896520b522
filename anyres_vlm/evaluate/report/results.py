"""What `anyres eval`, `score`, `eval heldout` and `probe` have written, read back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from anyres_vlm.errors import DataError
from anyres_vlm.evaluate.answers import read_json
from anyres_vlm.geometry import Tiling

HELDOUT = "heldout"
EXPECTED = "expected what anyres eval, score --out, eval heldout --out or probe --out has written"


@dataclass(frozen=True, slots=True)
class Answer:
    """One question with its truth and what was said; all but the points are empty where nothing recorded them."""

    points: float
    question: str = ""
    image: str = ""
    text: str = ""
    reference: str = ""
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """One benchmark's result. `score` in percent; `answers` by question; `label` tells the run from the others."""

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
    blind: bool = False

    @property
    def judged_by(self) -> str:
        """The models that graded the answers, as they called themselves."""
        names = self.scores.get("judged_by")
        return ", ".join(map(str, names)) if isinstance(names, list) else ""


@dataclass(frozen=True)
class Probes:
    """One run of the probes: scores and the replies behind them, by probe."""

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
class _HeldoutFile:
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


def read_runs(runs: Sequence[Path]) -> tuple[list[Result], list[Probes]]:
    """All results of folders and files, in the order given. Raises `DataError` for a run that holds none.

    Of a folder count the results in it; where it has none, those of folders called `eval` below it.
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
    """Each path without the folders that begin or end all of them."""
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
        raise DataError(f"{path}: no result; {EXPECTED}")
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
    )


def _heldout(path: Path, label: str, found: _HeldoutFile) -> Result:
    answers = {
        one.id: Answer(float(one.correct), one.question, one.image, one.answer, one.expected, (one.task,))
        for one in found.answers
    }
    if not answers or len(answers) < len(found.answers):
        raise DataError(f"{path}: {len(found.answers)} answers to {len(answers)} questions: expected one answer each")
    score = 100 * sum(answer.points for answer in answers.values()) / len(answers)
    protocol = {"scorer": "exact but for case and outer punctuation"}
    return Result(
        HELDOUT,
        label,
        found.model,
        round(score, 2),
        {},
        protocol,
        len(answers),
        answers,
        found.limit,
        tiling=found.tiling,
        blind=found.blind,
    )


def _marks(path: Path, found: _ResultFile) -> dict[str, Answer]:
    """What lies beside the result; its points alone where nothing does."""
    beside = path.with_name(f"{path.stem}.marks.jsonl")
    bare = {question: Answer(points) for question, points in found.points.items()}
    if not beside.exists() or not bare:
        return bare
    content = read_json(beside)
    lines = TypeAdapter(list[_Mark]).validate_python(content if isinstance(content, list) else [content])
    marks = {
        line.question_id: Answer(line.points, line.question, line.image, line.text, line.reference, line.kinds)
        for line in lines
    }
    if {question: mark.points for question, mark in marks.items()} != found.points:
        raise DataError(f"{beside}: marks of another result than {path.name}: score it again, or remove the marks")
    return marks
