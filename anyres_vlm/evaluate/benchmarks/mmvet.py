"""MM-Vet: free answers graded by a judge, by capability and by combination of capabilities.

The judge is a chat model at an OpenAI-compatible endpoint. Every grade is written to disk when it arrives.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.evaluate.answers import Answered, match
from anyres_vlm.evaluate.benchmarks.base import (
    LLAVA,
    Benchmark,
    ImageFolders,
    Mark,
    Question,
    Scored,
    find_file,
    image_question,
    make_mark,
    mean_by,
    questions_by_id,
    take,
)
from anyres_vlm.files import append, cut_partial_line, whole_lines

if TYPE_CHECKING:
    from openai import OpenAI

FILES = ["mm-vet.json", "*mm-vet*.json"]
DIGITS = 1
KEY_VARIABLE = "OPENAI_API_KEY"
RETRIES = 8  # of a request that fails, times out or is refused for load; the client waits up to 8 s in between
ATTEMPTS = 5  # to get a readable grade; then it is 0, as in MM-Vet's mm-vet_evaluator.py
GRADE_TOKENS = 3
SECOND_REQUEST = "\nPredict the correctness of the answer (digit): "

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


@dataclass(frozen=True, slots=True)
class Grade:
    """How correct an answer is, 0 to 1, with the judge's words and the name of the model that replied."""

    score: float
    content: str
    model: str


@dataclass(frozen=True)
class MMVet(Benchmark):
    """Questions that need several capabilities at once. Without a judge there are answers and no score."""

    judge: Judge | None
    name = "mmvet"
    max_new_tokens = 1024  # LLaVA's model_vqa.py

    @property
    def protocol(self) -> Mapping[str, str]:
        """What is pinned, and the judge that is set."""
        return {
            "prompt": "<image>\n{question}",
            "post_processing": f"none: {LLAVA}, convert_mmvet_for_eval.py at 5a5bda8)",
            "scorer": "MM-Vet, mm-vet_evaluator.py at 7d717c2, one run",
            "judge": self.judge.model if self.judge else "none",
            "judge_prompt": _prompt_name(self.judge.instructions) if self.judge else "none",
        }

    def questions(self, data: Path, images: Path | None, limit: int | None) -> list[Question]:
        path = _file(data)
        folders = ImageFolders(data, path, images, ())
        questions = []
        for name, entry in list(questions_by_id(path).items())[:limit]:
            where = f"{path}: question {name}"
            image = folders.find(take(entry, "imagename", str, where), where)
            questions.append(image_question(name, image, take(entry, "question", str, where)))
        return questions

    def annotations(self, data: Path) -> list[Path]:
        return [_file(data)] if self.judge else []

    def submission(self, data: Path, answers: Sequence[tuple[Question, str]]) -> tuple[str, Any]:
        return ".json", {question.id: text for question, text in answers}

    def score(self, annotations: Sequence[Path], given: Sequence[Answered], partial: bool) -> Scored:
        if self.judge is None:
            raise UsageError("mmvet: answers are graded by a judge: name its model with --judge")
        return _score(annotations, given, partial, self.judge.grade)

    def check_annotations(self, annotations: Sequence[Path], questions: Sequence[Question], partial: bool) -> None:
        given = [Answered(str(question.id), "", raw=True) for question in questions]
        _score(annotations, given, partial, lambda question, truth, answer: Grade(0.0, "", ""))


def _score(
    annotations: Sequence[Path], given: Sequence[Answered], partial: bool, grade: Callable[[str, str, str], Grade]
) -> Scored:
    (path,) = annotations
    entries = questions_by_id(path)
    ids = [_official_id(answer.id or "") for answer in given]
    found = match(given, entries, path, partial, ids)
    marks: dict[str, Mark] = {}
    models = set()
    for name, entry in entries.items():
        if name not in found:
            continue
        where = f"{path}: question {name}"
        truth = take(entry, "answer", str, where)
        question = take(entry, "question", str, where)
        needed = tuple(sorted(set(take(entry, "capability", list, where))))
        graded = grade(question, truth, found[name].text)
        models.add(graded.model)
        marks[name] = make_mark(graded.score, found[name], question, truth, str(entry.get("imagename", "")), needed)
    total = _percent([mark.points for mark in marks.values()])
    scores = {
        "total": total,
        "capabilities": mean_by(((kind, mark.points) for mark in marks.values() for kind in mark.kinds), _percent),
        "integrations": mean_by((("_".join(mark.kinds), mark.points) for mark in marks.values()), _percent),
        "judged_by": sorted(models),
    }
    return Scored(total, scores, marks)


@dataclass
class Judge:
    """Grades answers with a chat model whose API key is in OPENAI_API_KEY.

    `instructions` come before each question with its truth and the answer. `cache` keeps every grade as a line, so a
    killed run resumes.
    """

    model: str
    instructions: str
    cache: Path
    url: str | None = None
    timeout_s: float = 60.0
    _grades: dict[str, Grade] = field(default_factory=dict, init=False, repr=False)
    _client: OpenAI | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        for number, line in enumerate(whole_lines(self.cache), start=1):
            try:
                entry = json.loads(line)
                self._grades[entry["key"]] = Grade(entry["score"], entry["content"], entry["model"])
            except (ValueError, KeyError, TypeError):
                raise DataError(f"{self.cache} line {number}: not a grade; delete the file to grade again") from None
        cut_partial_line(self.cache)

    def grade(self, question: str, truth: str, answer: str) -> Grade:
        """Grade an answer, or return the grade that the cache has. Raises `DataError` if the endpoint keeps failing."""
        shown = truth.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        request = self.instructions + "\n" + " | ".join([question, shown, answer, ""])
        key = hashlib.sha256(json.dumps([self.model, request]).encode()).hexdigest()
        if key not in self._grades:
            self._grades[key] = grade = self._request_grade(request)
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            append(self.cache, json.dumps({"key": key} | asdict(grade)).encode() + b"\n")
        return self._grades[key]

    def _request_grade(self, request: str) -> Grade:
        """Request at temperature 0; if the reply is no number, again with a hint at 0, 0.5, 1 and 1.5."""
        content, model = self._complete(request, 0.0)
        for attempt in range(ATTEMPTS - 1):
            if (score := _number(content)) is not None:
                return Grade(score, content, model)
            content, model = self._complete(request + SECOND_REQUEST, 0.5 * attempt)
        return Grade(_number(content) or 0.0, content, model)

    def _complete(self, request: str, temperature: float) -> tuple[str, str]:
        from openai import OpenAIError  # an optional extra

        try:
            reply = self.connect().chat.completions.create(
                model=self.model,
                max_tokens=GRADE_TOKENS,
                temperature=temperature,
                messages=[{"role": "user", "content": request}],
            )
        except OpenAIError as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                f"the judge {self.model} at {self.connect().base_url} failed ({type(error).__name__}: {reason}): "
                f"{len(self._grades)} grades are kept in {self.cache}; rerun to resume"
            ) from None
        return (reply.choices[0].message.content or "") if reply.choices else "", reply.model

    def connect(self) -> OpenAI:
        """Return the client, made at the first call. Raises `UsageError` without the package or the key."""
        if self._client is None:
            try:
                from openai import OpenAI  # an optional extra
            except ModuleNotFoundError:
                raise UsageError("the judge needs the openai package: pip install 'anyres-vlm[judge]'") from None
            key = os.environ.get(KEY_VARIABLE)
            if not key:
                raise UsageError(
                    f"{KEY_VARIABLE} is not set: export the judge's key, or any value if the server needs none"
                )
            self._client = OpenAI(api_key=key, base_url=self.url, max_retries=RETRIES, timeout=self.timeout_s)
        return self._client


def read_instructions(path: Path) -> str:
    """Read the judge's instructions from a text file, or from the variable `prompt` of MM-Vet's own script."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".py":
            return text
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["prompt"]:
                return str(ast.literal_eval(node.value))
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError) as error:
        raise DataError(f"{path}: cannot read the judge's instructions ({error})") from None
    raise DataError(f"{path}: no `prompt` in it; expected MM-Vet's mm-vet_evaluator.py or a text file")


def _prompt_name(instructions: str) -> str:
    digest = hashlib.sha256(instructions.encode()).hexdigest()
    known = {OFFICIAL_SHA256: "MM-Vet's own", hashlib.sha256(INSTRUCTIONS.encode()).hexdigest(): "anyres_vlm's own"}
    return f"{known.get(digest, 'custom')}, sha256 {digest[:16]}"


def _number(content: str) -> float | None:
    """Return the number between 0 and 1 before the first space, if there is one."""
    try:
        score = float(content.split(" ")[0].strip())
    except ValueError:
        return None
    return score if 0.0 <= score <= 1.0 else None


def _percent(grades: Sequence[float]) -> float:
    """Return the mean in percent, rounded by NumPy, whose last digit can differ from Python's."""
    total = 0.0
    for grade in grades:  # sequentially, as in the official sum; NumPy sums in pairs
        total += grade
    return float(np.round(np.float64(total) / len(grades) * 100, DIGITS))


def _file(data: Path) -> Path:
    return find_file(data, FILES, "MM-Vet questions")


def _official_id(name: str) -> str:
    """Return an official id; LLaVA's answers name `v1_12` by its number only."""
    return f"v1_{name}" if name.isdecimal() else name
