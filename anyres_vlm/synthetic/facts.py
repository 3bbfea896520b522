"""What is true of a picture, in sentences and questions."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Literal

Task = Literal[
    "colour", "shape", "position", "count", "exists", "relation", "sign", "receipt", "table", "chart", "page"
]


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its short exact answer and the same answer as a sentence."""

    task: Task
    question: str
    answer: str
    sentence: str


@dataclass
class Facts:
    """Sentences and questions about one picture."""

    caption: str = ""
    detail: str = ""
    questions: list[Question] = field(default_factory=list)
    reasoning: list[tuple[str, str]] = field(default_factory=list)

    def ask(self, rng: random.Random, task: Task, wordings: list[str], answer: str, sentence: str) -> None:
        """Add a question in one of its wordings."""
        self.questions.append(Question(task, rng.choice(wordings), answer, sentence))


def listing(parts: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def plural(count: int, noun: str) -> str:
    """`1 star`, `2 stars`; crosses and boxes take -es."""
    return f"{count} {noun}" if count == 1 else f"{count} {plural_of(noun)}"


def plural_of(noun: str) -> str:
    """The plural of a shape or of `object`."""
    return f"{noun}es" if noun.endswith(("s", "x")) else f"{noun}s"


def an(word: str) -> str:
    """The word behind its indefinite article."""
    return f"{'an' if word[0] in 'aeio' else 'a'} {word}"
