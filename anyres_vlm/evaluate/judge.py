"""A judge of free answers behind an OpenAI-compatible endpoint: MM-Vet's words to it, every grade kept at once."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyres_vlm.durable import append
from anyres_vlm.errors import DataError, UsageError

if TYPE_CHECKING:
    from openai import OpenAI

KEY_VARIABLE = "OPENAI_API_KEY"
RETRIES = 8  # of one request that is refused for load, fails or times out; the client waits up to 8 s in between
ATTEMPTS = 5  # at a grade that can be read; then it is 0, as in MM-Vet's mm-vet_evaluator.py
GRADE_TOKENS = 3
SECOND_REQUEST = "\nPredict the correctness of the answer (digit): "


@dataclass(frozen=True, slots=True)
class Grade:
    """How right an answer is, 0 to 1, the judge's own words and the model that answered."""

    score: float
    content: str
    model: str


@dataclass
class Judge:
    """Grades answers with a chat model. `cache` holds every grade as a line, so that a run goes on after a kill.

    `instructions` come before each question with its truth and the answer. The key is read from OPENAI_API_KEY.
    """

    model: str
    instructions: str
    cache: Path
    url: str | None = None
    timeout_s: float = 60.0
    _grades: dict[str, Grade] = field(default_factory=dict, init=False, repr=False)
    _client: OpenAI | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.cache.exists():
            return
        lines = self.cache.read_bytes().split(b"\n")
        if lines[-1]:  # a kill cut it short
            os.truncate(self.cache, self.cache.stat().st_size - len(lines[-1]))
        for line in lines[:-1]:
            try:
                entry = json.loads(line)
                self._grades[entry["key"]] = Grade(entry["score"], entry["content"], entry["model"])
            except (ValueError, KeyError, TypeError):
                raise DataError(f"{self.cache}: a line of it is broken: delete the file to grade anew") from None

    def grade(self, question: str, truth: str, answer: str) -> Grade:
        """Ask, unless the same was asked before. Raises `DataError` where the endpoint fails for good."""
        shown = truth.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        request = self.instructions + "\n" + " | ".join([question, shown, answer, ""])
        key = hashlib.sha256(json.dumps([self.model, request]).encode()).hexdigest()
        if key not in self._grades:
            self._grades[key] = self._ask(request)
            self._keep(key, self._grades[key])
        return self._grades[key]

    def _ask(self, request: str) -> Grade:
        """The first request at temperature 0; again with a hint at 0, 0.5, 1 and 1.5 while there is no number."""
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
                f"the {len(self._grades)} grades so far are in {self.cache}; run it again to go on"
            ) from None
        return (reply.choices[0].message.content or "") if reply.choices else "", reply.model

    def connect(self) -> OpenAI:
        """The client, made once. Raises `UsageError` without the package or the key."""
        if self._client is None:
            try:
                from openai import OpenAI  # an optional extra
            except ModuleNotFoundError:
                raise UsageError("the judge needs the openai package: pip install 'anyres-vlm[judge]'") from None
            key = os.environ.get(KEY_VARIABLE)
            if not key:
                raise UsageError(f"{KEY_VARIABLE} is not set: export the judge's key, or any word for a server without")
            self._client = OpenAI(api_key=key, base_url=self.url, max_retries=RETRIES, timeout=self.timeout_s)
        return self._client

    def _keep(self, key: str, grade: Grade) -> None:
        entry: dict[str, Any] = {"key": key} | asdict(grade)
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        append(self.cache, json.dumps(entry).encode() + b"\n")


def _number(content: str) -> float | None:
    """A number between 0 and 1 at the beginning, before the first space."""
    try:
        score = float(content.split(" ")[0].strip())
    except ValueError:
        return None
    return score if 0.0 <= score <= 1.0 else None
