"""What a probe consists of: cases with exact answers, the replies of a model, and a score."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

BACKGROUND = (255, 255, 255)


@dataclass(frozen=True)
class Case:
    """An image, a question about it, the correct answer, and `facts`: the values that the probe varies."""

    image: Image.Image
    question: str
    answer: str
    facts: dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """A case without its image, and what the model `said`."""

    question: str
    answer: str
    facts: dict[str, Any]
    said: str


@dataclass(frozen=True)
class Probe:
    """One failure mode. `cases` takes the side of the image in pixels, the images per value, and a seed."""

    cases: Callable[[int, int, int], Iterator[Case]]
    score: Callable[[Sequence[Reply]], dict[str, Any]]


def seeded(probe: str, seed: int, number: int) -> random.Random:
    """Return the random generator of one image. Training images use other seed strings, so none is probed."""
    return random.Random(f"probe {probe}/{seed}/{number}")


def yes_or_no(said: str) -> bool | None:
    """Return whether an answer begins with yes or no; None for any other answer."""
    first = re.match(r"\W*(yes|no)\b", said.lower())
    return None if first is None else first[1] == "yes"
