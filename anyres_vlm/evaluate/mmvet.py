"""MM-Vet: free answers graded by a judge, by capability and by what capabilities a question needs together."""

from __future__ import annotations

import ast
import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.evaluate.answers import Answered, match
from anyres_vlm.evaluate.benchmark import (
    LLAVA,
    ImageFolders,
    Mark,
    Question,
    Scored,
    find_file,
    questions_by_id,
    take,
)
from anyres_vlm.evaluate.judge import Judge

FILES = ["mm-vet.json", "*mm-vet*.json"]
DIGITS = 1

OFFICIAL_SHA256 = (
    "d1b3e0a5b4e72c888b77164489d705bba4dd149934fff564dfba6443d81afe3f"  # of `prompt` in mm-vet_evaluator.py
)
INSTRUCTIONS = """\
Grade how correct a prediction is against the ground truth, from 0.0 (nothing is right) over 0.1, 0.2 and so on to 1.0
(all is right). Parts joined by <AND> must all be in the prediction to count in full; of parts joined by <OR> one is
enough. Complete the last row with its grade and nothing else.

Question | Ground truth | Prediction | Correctness
--- | --- | --- | ---
Which two fruits lie on the plate? | a pear <AND> a plum | A melon. | 0.0
Which two fruits lie on the plate? | a pear <AND> a plum | There is a pear on it. | 0.5
Which two fruits lie on the plate? | a pear <AND> a plum | A plum beside a pear. | 1.0
What does the man hold? | an umbrella <OR> a parasol | It is a parasol. | 1.0
Why does the crowd laugh? | The clown slips on a peel and his hat falls on the dog. | Because a clown slips. | 0.4
"""


@dataclass(frozen=True)
class MMVet:
    """Questions that need several capabilities at once. Without a judge there are answers and no score."""

    judge: Judge | None
    name = "mmvet"
    max_new_tokens = 1024  # LLaVA's model_vqa.py

    @property
    def protocol(self) -> Mapping[str, str]:
        """What is pinned, and the judge that was asked for."""
        return {
            "prompt": "<image>\n{question}",
            "post_processing": f"none: {LLAVA}, convert_mmvet_for_eval.py at 5a5bda8)",
            "scorer": "MM-Vet, mm-vet_evaluator.py at 7d717c2, one run",
            "judge": self.judge.model if self.judge else "none",
            "judge_prompt": _prompt_name(self.judge.instructions) if self.judge else "none",
        }

    def questions(self, data: Path, images: Path | None, limit: int | None) -> list[Question]:
        path = _file(data)
        folders = ImageFolders(path, images, ())
        questions = []
        for name, entry in list(questions_by_id(path).items())[:limit]:
            where = f"{path}: question {name}"
            image = folders.find(take(entry, "imagename", str, where), where)
            questions.append(Question(name, image, take(entry, "question", str, where)))
        return questions

    def annotations(self, data: Path) -> list[Path]:
        return [_file(data)] if self.judge else []

    def submission(self, data: Path, answers: Sequence[tuple[Question, str]]) -> tuple[str, Any]:
        return ".json", {question.id: text for question, text in answers}

    def score(self, annotations: Sequence[Path], given: Sequence[Answered], partial: bool) -> Scored:
        (path,) = annotations
        entries = questions_by_id(path)
        ids = [_official(answer.id or "") for answer in given]
        found = match(given, set(ids) & set(entries) if partial else entries, ids)
        if not found:
            raise DataError(f"{path}: no questions in it")
        if self.judge is None:
            raise UsageError("mmvet: answers are graded by a judge: name its model with --judge")
        marks: dict[str, Mark] = {}
        models = set()
        groups: dict[str, dict[str, list[float]]] = {
            "capabilities": defaultdict(list),
            "integrations": defaultdict(list),
        }
        for name, entry in entries.items():
            if name not in found:
                continue
            where = f"{path}: question {name}"
            truth = take(entry, "answer", str, where)
            question = take(entry, "question", str, where)
            grade = self.judge.grade(question, truth, found[name].text)
            models.add(grade.model)
            needed = sorted(set(take(entry, "capability", list, where)))
            image = str(entry.get("imagename", ""))
            marks[name] = Mark(grade.score, found[name], question, truth, image, tuple(needed))
            for capability in needed:
                groups["capabilities"][capability].append(grade.score)
            groups["integrations"]["_".join(needed)].append(grade.score)
        total = _percent([mark.points for mark in marks.values()])
        scores: dict[str, Any] = {"total": total}
        scores |= {kind: {name: _percent(of[name]) for name in sorted(of)} for kind, of in groups.items()}
        return Scored(total, scores | {"judged_by": sorted(models)}, marks)


def read_instructions(path: Path) -> str:
    """The judge's instructions out of a text file, or out of MM-Vet's own script, where they are called `prompt`."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".py":
            return text
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["prompt"]:
                return str(ast.literal_eval(node.value))
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError) as error:
        raise DataError(f"{path}: the judge's instructions cannot be read ({error})") from None
    raise DataError(f"{path}: no `prompt` in it; expected MM-Vet's mm-vet_evaluator.py or a text file")


def _prompt_name(instructions: str) -> str:
    digest = hashlib.sha256(instructions.encode()).hexdigest()
    known = {OFFICIAL_SHA256: "MM-Vet's own", hashlib.sha256(INSTRUCTIONS.encode()).hexdigest(): "anyres_vlm's own"}
    return f"{known.get(digest, 'custom')}, sha256 {digest[:16]}"


def _percent(grades: Sequence[float]) -> float:
    """Rounded by NumPy, whose last digit is not always Python's."""
    total = 0.0
    for grade in grades:  # one by one, as the official sum is; NumPy's own sum adds in pairs
        total += grade
    return float(np.round(np.float64(total) / len(grades) * 100, DIGITS))


def _file(data: Path) -> Path:
    return find_file(data, FILES, "MM-Vet questions")


def _official(name: str) -> str:
    """LLaVA's answers name `v1_12` by its number alone."""
    return f"v1_{name}" if name.isdecimal() else name
