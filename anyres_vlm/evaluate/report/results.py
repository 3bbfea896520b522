"""Result files: written by `anyres eval` and `score`, and read back together with those of `probe`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from anyres_vlm.errors import DataError
from anyres_vlm.evaluate.answers import read_json
from anyres_vlm.evaluate.benchmarks.base import Mark, Scored
from anyres_vlm.evaluate.benchmarks.heldout import BLIND, Heldout
from anyres_vlm.files import replacing
from anyres_vlm.geometry import Tiling

EXPECTED = "expected a file written by anyres eval, score --out or probe --out"
RESULT_KEYS, HELDOUT_KEYS, PROBES_KEYS = {"benchmark", "scores"}, {"accuracy", "answers"}, {"scores", "replies"}


@dataclass(frozen=True)
class Result:
    """One benchmark's result. `score` is in percent; `answers` are by question; `label` identifies the run."""

    benchmark: str
    score: float | None
    scores: Mapping[str, Any]
    questions: int
    protocol: Mapping[str, str]
    model: str = ""
    limit: int | None = None
    unasked: tuple[Any, ...] = ()
    tiling: Tiling | None = None
    annotations: tuple[str, ...] = ()
    label: str = ""
    answers: Mapping[str, Mark] = field(default_factory=dict)

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

    scores: Mapping[str, Any]
    replies: Mapping[str, Sequence[Mapping[str, Any]]]
    model: str = ""
    count: int = 0
    label: str = ""


class _Points(BaseModel):
    points: dict[str, float]


def write_result(folder: Path, title: str, result: Mapping[str, Any], scored: Scored) -> None:
    """Write `TITLE.json` with the points of every question, and `TITLE.marks.jsonl` with questions and answers."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / f"{title}.marks.jsonl") as file:
        for question, mark in scored.marks.items():
            file.write(json.dumps({"question_id": question} | asdict(mark)) + "\n")
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
        if found := [path for path in sorted(run.glob(pattern)) if path.is_file() and _is_result(read_json(path))]:
            return found
    raise DataError(f"{run}: no result in it; {EXPECTED}")


def _is_result(content: Any) -> bool:
    kinds = (RESULT_KEYS, HELDOUT_KEYS, PROBES_KEYS)
    return isinstance(content, dict) and any(keys <= content.keys() for keys in kinds)


def _labels(places: Sequence[Path]) -> list[str]:
    """Shorten each path by the folders that all paths begin or end with."""
    parts = {place: list(place.parts) for place in places}
    if len(parts) > 1:
        for end in (0, -1):
            while min(map(len, parts.values())) > 1 and len({names[end] for names in parts.values()}) == 1:
                for names in parts.values():
                    del names[end]
    return [str(Path(*parts[place])) for place in places]


def _read(path: Path, label: str) -> Result | Probes:
    content = read_json(path)
    if not _is_result(content):
        raise DataError(f"{path}: not a result; {EXPECTED}")
    content["label"] = label
    try:
        if content.keys() >= RESULT_KEYS:
            result = TypeAdapter(Result).validate_python(content | {"answers": {}})
            points = _Points.model_validate(content).points
            marks = _read_marks(path, points) or {question: Mark(number) for question, number in points.items()}
            return replace(result, answers=marks)
        if content.keys() >= HELDOUT_KEYS:
            return _read_heldout(path, content)
        return TypeAdapter(Probes).validate_python(content)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"]))
        raise DataError(f"{path}: {place or 'content'}: {fault['msg']}; {EXPECTED}") from None


def _read_marks(path: Path, points: Mapping[str, float]) -> dict[str, Mark]:
    """Read the marks of a result; nothing without their file, when only the points are known."""
    marks_file = path.with_name(f"{path.stem}.marks.jsonl")
    if not marks_file.exists() or not points:
        return {}
    content = read_json(marks_file)
    lines = TypeAdapter(list[dict[str, Any]]).validate_python(content if isinstance(content, list) else [content])
    by_question = {str(line.get("question_id")): line for line in lines}
    marks = TypeAdapter(dict[str, Mark]).validate_python(by_question)
    if {question: mark.points for question, mark in marks.items()} != points:
        raise DataError(f"{marks_file}: belongs to another result than {path.name}: score again, or delete the marks")
    return marks


def _read_heldout(path: Path, content: Mapping[str, Any]) -> Result:
    """Read a result of held-out questions in the format of earlier releases."""
    try:
        answers = {
            one["id"]: {
                "points": one["correct"],
                "question": one["question"],
                "image": one.get("image", ""),
                "text": one["answer"],
                "reference": one["expected"],
                "kinds": [one["task"]],
            }
            for one in content["answers"]
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: answers: {type(error).__name__} {error}; {EXPECTED}") from None
    if not answers or len(answers) < len(content["answers"]):
        raise DataError(f"{path}: {len(content['answers'])} answers to {len(answers)} questions: expected one each")
    found = {
        "benchmark": Heldout.name,
        "score": None,
        "scores": {},
        "questions": len(answers),
        "protocol": Heldout(swap_images=content.get("blind") is True).protocol,
        "answers": answers,
    }
    result = TypeAdapter(Result).validate_python({**content, **found})
    return replace(result, score=round(100 * fmean(mark.points for mark in result.answers.values()), 2))
