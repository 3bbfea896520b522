"""COCO's objects in a text: where a word names one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

# Phrases that hold an object's name and do not name the object.
NEUTRAL = """
bear in mind|bears in mind|bearing in mind|bed of|flower bed|truck bed|bird's-eye|bird's eye|birdbath|book club
book store|bookstore|bus stop|bus station|bus shelter|cable car|car park|cat nap|chair lift|around the clock|dog park
horse racing|train station|train track|train tracks|train platform|train of thought|train car|train cars|world cup
boat house|pizza box|pizza boxes|bird feeder|bird house|toilet paper|bed linen|bed sheets|cake stand|bowl over
orange juice|apple pie|banana bread|book shelf|couch potato|sheep dog|carrot cake|oven mitt|oven mitts|parking lot
phone call|cup of tea|bear the|bears the|bear fruit|bears fruit|bear weight|book a|book their|book your|to train
trains hard|bird watching|bird's nest|fork in the road|elephant in the room|umbrella term|bench press|kite surfing
boat ride|bus ride|bus driver|bus route|bus lane|bus terminal|train ride|train journey|car seat|car wash|car show
car dealership|car rental|apple logo|apple computer|apple laptop|apple macbook|apple tree|apple trees|orange tree
banana tree|pizza parlor|cake pan|dog owner|dog owners|cat lover|cat lovers|truck stop|pizza place
"""


@dataclass(frozen=True, slots=True)
class Word:
    """One way to name a category. `whole`: it means all of the category; `sure`: it hardly means anything else."""

    category: str
    whole: bool
    sure: bool


@dataclass(frozen=True, slots=True)
class Mention:
    """A word of a text that names an object."""

    word: Word
    start: int
    end: int


@cache
def _table() -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "objects.yaml").read_text("utf-8"))
    return table


@cache
def vocabulary() -> dict[str, Word]:
    """Every word with its plural."""
    words: dict[str, Word] = {}
    for category, names in _table().items():
        sure = not names.get("kinds_only", False)
        for name in (category, *names["same"]):
            words |= {form: Word(category, True, sure) for form in _forms(name)}
        for name in names["kinds"]:
            words |= {form: Word(category, False, True) for form in _forms(name)}
    return words


@cache
def words_pattern(whole: bool = False) -> str:
    """A regular expression for any word, the longest first; `whole` leaves kinds out."""
    chosen = (text for text, word in vocabulary().items() if word.whole or not whole)
    return "(?:" + "|".join(map(re.escape, sorted(chosen, key=len, reverse=True))) + ")"


def category_of(name: str) -> str | None:
    """The COCO category that a box's name is, if any."""
    word = vocabulary().get(name.lower().strip())
    return None if word is None else word.category


def hinted(category: str, text: str) -> bool:
    """Whether a text has a word that may mean the category without naming it."""
    pattern = _hints(category)
    return pattern is not None and pattern.search(text.lower()) is not None


@cache
def _hints(category: str) -> re.Pattern[str] | None:
    hints = _table()[category].get("hints")
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, hints))})(?:s|es)?\b") if hints else None


def find_objects(text: str) -> Iterator[Mention]:
    """Every word that names an object, in order; the longest where several begin at one place."""
    text, done = text.lower(), 0
    for first in FIRST_WORD.finditer(text):
        if first.start() < done:
            continue
        for name, word in _by_first_word().get(first.group(), ()):
            end = first.start() + len(name)
            if text.startswith(name, first.start()) and not text[end : end + 1].isalnum():
                done = end
                if word is not None:
                    yield Mention(word, first.start(), end)
                break


FIRST_WORD = re.compile(r"[a-z]+")


@cache
def _by_first_word() -> dict[str, list[tuple[str, Word | None]]]:
    """Names and neutral phrases by the word that they begin with, the longest first."""
    neutral = dict.fromkeys(NEUTRAL.strip().replace("\n", "|").split("|"))
    table: dict[str, list[tuple[str, Word | None]]] = {}
    for name, word in sorted((neutral | vocabulary()).items(), key=lambda pair: -len(pair[0])):
        first = FIRST_WORD.match(name)
        assert first is not None, "names begin with a letter"
        table.setdefault(first.group(), []).append((name, word))
    return table


def _forms(name: str) -> tuple[str, ...]:
    return name, f"{name}s", f"{name}es"
