"""Check that a conversation agrees with captions and boxes: its objects, counts, and left and right."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from anyres_vlm.instruct.annotations import Box, Object, Scene
from anyres_vlm.schema import Turn

RejectKind = Literal[
    "refused_request",
    "broken_response",
    "cut_short",
    "refusal",
    "malformed",
    "wrong_turns",
    "mentions_input",
    "absent_objects",
    "wrong_count",
    "wrong_side",
    "near_duplicate",
    "unfinished",
]


class Reject(Exception):
    """A rejected response and the reason.

    Reasons are written to the data set's rejects.jsonl; changing their wording changes what a replay of an old log
    writes.
    """

    def __init__(self, kind: RejectKind, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason


NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
NEGATION = re.compile(r"\b(?:no|not|without|never|neither|nor|absence of|lack of)\b[^.,;:!?]*\Z|n't\b[^.,;:!?]*\Z")
HYPOTHESIS = re.compile(r"\b(?:may|might|could|would|should|if|needs?|needed|such as|for example|like an?)\b[^.;!?]*\Z")
BEFORE = 120  # characters before a word that are searched for a negation
PICTURE = r"(?:image|picture|photo|photograph|scene|frame)"
NUMBER = rf"(?P<number>{'|'.join(NUMBERS[1:])}|[1-9]\d?)"
SLACK = 0.03  # of the image's width; objects closer than this are neither left nor right of each other


def require_grounded(turns: Sequence[Turn], scene: Scene, max_absent: int) -> None:
    """Raise `Reject` for answers that name more than `max_absent` absent categories or contradict the boxes."""
    answers = [turn.text for turn in turns if turn.role == "assistant"]
    if len(absent := absent_objects(answers, scene)) > max_absent:
        raise Reject("absent_objects", f"neither captions nor boxes have {', '.join(absent)}")
    for said, category, number in stated_counts(turns):
        true = _objects(scene, category)
        if len(true) in (0, number) or any(item.crowd for item in true) or _caption_counts(scene, category, number):
            continue
        raise Reject("wrong_count", f"{said!r}: the boxes have {len(true)} of {category}")
    for answer in answers:
        _require_sides(answer, scene)


def absent_objects(answers: Sequence[str], scene: Scene) -> list[str]:
    """Return the COCO categories, sorted, that answers name as present and no caption or box names or hints at."""
    named = set()
    for answer in map(str.lower, answers):
        for mention in find_objects(answer):
            before = answer[max(mention.start - BEFORE, 0) : mention.start]
            if mention.word.sure and not NEGATION.search(before) and not HYPOTHESIS.search(before):
                named.add(mention.word.category)
    source = "\n".join([*scene.captions, *dict.fromkeys(item.name for item in scene.objects)])
    known = {mention.word.category for mention in find_objects(source)}
    return sorted(category for category in named - known if not hinted(category, source))


def stated_counts(turns: Sequence[Turn]) -> list[tuple[str, str, int]]:
    """Return (text, category, number) of every statement about how many objects the whole image has."""
    counts = []
    for position, turn in enumerate(turns):
        text = turn.text.lower()
        if turn.role == "user":
            asked = _question().search(text)
            answer = turns[position + 1].text
            if asked and (given := ANSWER_NUMBER.match(answer.lower())):
                counts.append((answer[:60], vocabulary()[asked["noun"]].category, _number(given["number"])))
            continue
        for found in _statement().finditer(text):
            counts.append((found.group(), vocabulary()[found["noun"]].category, _number(found["number"])))
    return counts


ANSWER_NUMBER = re.compile(rf"\W*(?:there (?:are|is) )?(?:exactly |a total of )?{NUMBER}\b(?! or\b| to\b|-)")


@cache
def _question() -> re.Pattern[str]:
    seen = r"are|are there|are (?:visible|shown|present)|can (?:be seen|you see)|do you see|appear"
    return re.compile(
        rf"\bhow many (?P<noun>{words_pattern(whole=True)}) (?:{seen})(?: (?:in|on) (?:the|this) {PICTURE})?\?"
    )


@cache
def _statement() -> re.Pattern[str]:
    """Match whole clauses only: `there are two people standing by the door` does not exclude others."""
    seen = r"(?: (?:visible|present|shown|in total))?"
    end = rf"(?={seen} (?:in|on) (?:the|this) {PICTURE}\b|{seen}(?:[.;!,]|\Z))"
    noun = rf"(?P<noun>{words_pattern(whole=True)})"
    return re.compile(rf"\bthere (?:are|is) (?:exactly |a total of )?{NUMBER} {noun}{end}")


@cache
def _side_claim() -> re.Pattern[str]:
    verb = r"is|are|stands?|sits?|lies|standing|sitting|lying|located|positioned|placed|parked|situated|seen|visible"
    one, other = rf"\b(?P<one>{words_pattern()})", rf"(?P<other>{words_pattern()}|{PICTURE})\b"
    side = r"(?:to|on) the (?:far )?(?P<side>left|right)(?:[- ]hand)?(?: side)? of (?:the|a|an) (?:\w+ )??"
    return re.compile(rf"{one}(?: (?:{verb})){{0,3}} {side}{other}")


def _require_sides(answer: str, scene: Scene) -> None:
    """Raise `Reject` for a claim about left or right that holds for none of the boxes it may refer to."""
    if " left" not in answer and " right" not in answer:  # saves a third of all checks' time
        return
    for claim in _side_claim().finditer(answer.lower()):
        ones = [_middle(item.box) for item in _objects(scene, vocabulary()[claim["one"]].category)]
        other = vocabulary().get(claim["other"])
        others = [0.5] if other is None else [_middle(item.box) for item in _objects(scene, other.category)]
        sign = 1 if claim["side"] == "left" else -1
        if ones and others and not any(sign * (right - left) > -SLACK for left in ones for right in others):
            raise Reject("wrong_side", f"{claim.group()!r}: the boxes say otherwise")


def _objects(scene: Scene, category: str) -> list[Object]:
    return [item for item in scene.objects if category_of(item.name) == category]


def _caption_counts(scene: Scene, category: str, number: int) -> bool:
    """Return whether a caption gives that number of the category: annotators overlook boxes."""
    word = NUMBERS[number] if number < len(NUMBERS) else str(number)
    pattern = rf"\b(?:{word}|{number}) (?:\w+ ){{0,2}}?(?P<noun>{words_pattern()})\b"
    return any(
        vocabulary()[found["noun"]].category == category
        for caption in scene.captions
        for found in re.finditer(pattern, caption.lower())
    )


def _middle(box: Box) -> float:
    return (box.left + box.right) / 2


def _number(text: str) -> int:
    return NUMBERS.index(text) if text in NUMBERS else int(text)


# Phrases that contain an object's name without naming the object.
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
    """A word for a category. `whole`: it covers the whole category; `sure`: it rarely means anything else."""

    category: str
    whole: bool
    sure: bool


@dataclass(frozen=True, slots=True)
class Mention:
    """An occurrence of a word in a text."""

    word: Word
    start: int
    end: int


@cache
def _table() -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "objects.yaml").read_text("utf-8"))
    return table


@cache
def vocabulary() -> dict[str, Word]:
    """Return all words for objects, plurals included."""
    words: dict[str, Word] = {}
    for category, names in _table().items():
        whole = Word(category, True, not names.get("kinds_only", False))
        part = Word(category, False, True)
        named = dict.fromkeys((category, *names["same"]), whole) | dict.fromkeys(names["kinds"], part)
        for name, word in named.items():
            words |= dict.fromkeys((name, f"{name}s", f"{name}es"), word)
    return words


@cache
def words_pattern(whole: bool = False) -> str:
    """Return a regular expression for any word, longest first; `whole` excludes words for a part of a category."""
    chosen = (text for text, word in vocabulary().items() if word.whole or not whole)
    return "(?:" + "|".join(map(re.escape, sorted(chosen, key=len, reverse=True))) + ")"


def category_of(name: str) -> str | None:
    """Return the COCO category for the name of a box; None if there is none."""
    word = vocabulary().get(name.lower().strip())
    return None if word is None else word.category


def hinted(category: str, text: str) -> bool:
    """Return whether a text has a word that may refer to the category without naming it."""
    hints = "|".join(map(re.escape, _table()[category].get("hints", ())))
    return bool(hints) and re.search(rf"\b(?:{hints})(?:s|es)?\b", text.lower()) is not None


def find_objects(text: str) -> Iterator[Mention]:
    """Yield the words of a text that name objects, in order; of several at one place, the longest."""
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
    """Return names and neutral phrases by their first word, longest first."""
    neutral = dict.fromkeys(NEUTRAL.strip().replace("\n", "|").split("|"))
    table: dict[str, list[tuple[str, Word | None]]] = {}
    for name, word in sorted((neutral | vocabulary()).items(), key=lambda pair: -len(pair[0])):
        first = FIRST_WORD.match(name)
        assert first is not None, "names begin with a letter"
        table.setdefault(first.group(), []).append((name, word))
    return table
