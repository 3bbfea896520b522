"""Whether a conversation says what captions and boxes do: its objects, and its counts and sides where it is plain."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

from anyres_vlm.instruct.objects import category_of, find_objects, hinted, vocabulary, words_pattern
from anyres_vlm.instruct.parse import Reject
from anyres_vlm.instruct.scene import Box, Scene
from anyres_vlm.schema import Turn

NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
NEGATION = re.compile(r"\b(?:no|not|without|never|neither|nor|absence of|lack of)\b[^.,;:!?]*\Z|n't\b[^.,;:!?]*\Z")
HYPOTHESIS = re.compile(r"\b(?:may|might|could|would|should|if|needs?|needed|such as|for example|like an?)\b[^.;!?]*\Z")
BEFORE = 120  # characters before a word that may say that it is not there
PICTURE = r"(?:image|picture|photo|photograph|scene|frame)"
NUMBER = rf"(?P<number>{'|'.join(NUMBERS[1:])}|[1-9]\d?)"
SLACK = 0.03  # of the image's width: nearer than this, left and right are a matter of taste


def require_grounded(turns: Sequence[Turn], scene: Scene, max_absent: int) -> None:
    """Raises `Reject` for answers that name more than so many kinds of absent objects, or contradict the boxes."""
    answers = [turn.text for turn in turns if turn.role == "assistant"]
    if len(absent := absent_objects(answers, scene)) > max_absent:
        raise Reject("absent_objects", f"neither captions nor boxes have {', '.join(absent)}")
    for said, category, number in stated_counts(turns):
        true = _boxes(scene, category)
        if (
            true
            and len(true) != number
            and not _crowded(scene, category)
            and not _caption_counts(scene, category, number)
        ):
            raise Reject("wrong_count", f"{said!r}: the boxes have {len(true)} of {category}")
    for answer in answers:
        _require_sides(answer, scene)


def absent_objects(answers: Sequence[str], scene: Scene) -> list[str]:
    """COCO categories that answers name as there, and neither a caption nor a box does or hints at. Sorted."""
    named = set()
    for answer in map(str.lower, answers):
        for mention in find_objects(answer):
            before = answer[max(mention.start - BEFORE, 0) : mention.start]
            if mention.word.sure and not NEGATION.search(before) and not HYPOTHESIS.search(before):
                named.add(mention.word.category)
    told = "\n".join([*scene.captions, *dict.fromkeys(item.name for item in scene.objects)])
    known = {mention.word.category for mention in find_objects(told)}
    return sorted(category for category in named - known if not hinted(category, told))


def stated_counts(turns: Sequence[Turn]) -> list[tuple[str, str, int]]:
    """What is said, its category and its number, where a turn states how many there are in the whole image."""
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
    """A whole clause, so that `there are two people standing by the door` may leave others out."""
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
    """Raises `Reject` where a claim holds for none of the boxes that it may be about."""
    if " left" not in answer and " right" not in answer:  # saves a third of all checks' time
        return
    for claim in _side_claim().finditer(answer.lower()):
        ones = [_middle(box) for box in _boxes(scene, vocabulary()[claim["one"]].category)]
        other = vocabulary().get(claim["other"])
        others = [0.5] if other is None else [_middle(box) for box in _boxes(scene, other.category)]
        sign = 1 if claim["side"] == "left" else -1
        if ones and others and not any(sign * (right - left) > -SLACK for left in ones for right in others):
            raise Reject("wrong_side", f"{claim.group()!r}: the boxes say otherwise")


def _boxes(scene: Scene, category: str) -> list[Box]:
    return [item.box for item in scene.objects if category_of(item.name) == category]


def _crowded(scene: Scene, category: str) -> bool:
    return any(item.crowd and category_of(item.name) == category for item in scene.objects)


def _caption_counts(scene: Scene, category: str, number: int) -> bool:
    """Whether a caption gives that number of the category: annotators overlook boxes."""
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
