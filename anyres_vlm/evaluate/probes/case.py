"""One question of a probe, and what a model said to it."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any

from PIL import Image

from anyres_vlm.synthetic.drawing import Sheet
from anyres_vlm.synthetic.vocabulary import COLOURS, SHAPES

GROUND = (255, 255, 255)
Pair = tuple[str, str]
"""A colour and a shape."""


@dataclass(frozen=True)
class Case:
    """A picture, a question about it, the right answer, and `facts`: what the probe varies."""

    image: Image.Image
    question: str
    answer: str
    facts: dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """A case without its picture, and what was said."""

    question: str
    answer: str
    facts: dict[str, Any]
    said: str


def draws(probe: str, seed: int, number: int) -> random.Random:
    """The source of a probe's chance. No training picture is drawn from it: theirs are named otherwise."""
    return random.Random(f"probe {probe}/{seed}/{number}")


def scatter(rng: random.Random, side: int, objects: list[Pair], smallest: float, largest: float) -> Sheet:
    """A square picture with objects where none touches another, each of a size between two shares of the side.

    Starts anew when chance leaves no room, so the shares must be small enough for so many.
    """
    while True:
        sheet = Sheet(side, side, GROUND)
        if all(_place(rng, sheet, pair, smallest, largest) for pair in objects):
            return sheet


def _place(rng: random.Random, sheet: Sheet, pair: Pair, smallest: float, largest: float) -> bool:
    for _ in range(40):
        size = round(sheet.width * rng.uniform(smallest, largest))
        left, top = (rng.randint(2, sheet.width - size - 2) for _ in range(2))
        if sheet.is_free(left, top, size):
            sheet.object(*pair, left, top, size)
            return True
    return False


def all_pairs() -> list[Pair]:
    """Every colour with every shape."""
    return [(colour, shape) for colour in COLOURS for shape in SHAPES]


def yes_or_no(said: str) -> bool | None:
    """Whether an answer begins with yes or no; None for any other."""
    first = re.match(r"\W*(yes|no)\b", said.lower())
    return None if first is None else first[1] == "yes"
