"""Images drawn to probe hallucination, spatial relations, counting and reading, with exact answers and scores."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from PIL import Image, ImageDraw

from anyres_vlm.evaluate.benchmarks.pope import yes_no_rates
from anyres_vlm.synthetic.drawing import FACES, Sheet, font
from anyres_vlm.synthetic.words import COLOURS, HELDOUT_WORDS, RGB, SHAPES, an, plural_of, words_of

BACKGROUND = (255, 255, 255)
THUMBNAIL = "reading, thumbnail alone"  # key in probes.json of the run without tiles

Pair = tuple[str, str]
"""A colour and a shape."""

ALL_PAIRS: list[Pair] = [(colour, shape) for colour in COLOURS for shape in SHAPES]
# What is absent: any object, or one whose colour and shape both occur in the image.
SPLITS = ("random", "adversarial")
MIN_GAP = 0.2  # of the side: centres are at least this far apart along the axis of the question
RELATIONS = {"left of": (1, 1), "right of": (1, -1), "above": (0, 1), "below": (0, -1)}  # axis of (y, x), direction
COUNTS = range(1, 13)
NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()


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


def seeded(probe: str, seed: int, number: int) -> random.Random:
    """Return the random generator of one image. Training images use other seed strings, so none is probed."""
    return random.Random(f"probe {probe}/{seed}/{number}")


def yes_or_no(said: str) -> bool | None:
    """Return whether an answer begins with yes or no; None for any other answer."""
    first = re.match(r"\W*(yes|no)\b", said.lower())
    return None if first is None else first[1] == "yes"


def scatter(rng: random.Random, side: int, objects: Sequence[Pair], smallest: float, largest: float) -> Sheet:
    """Draw a square image of objects that do not touch, with sizes between two shares of the side.

    Starts over if there is no room left, so the shares must be small enough for the number of objects.
    """
    while True:
        sheet = Sheet(side, side, BACKGROUND)
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


def hallucination_cases(side: int, count: int, seed: int) -> Iterator[Case]:
    """Yield for `count` images of each split a question about a present object and one about an absent object."""
    for split in SPLITS:
        for number in range(count):
            rng = seeded(f"hallucination {split}", seed, number)
            absent: list[Pair] = []
            while not absent:  # three objects of one colour leave no adversarial one
                shown = rng.sample(ALL_PAIRS, rng.randint(3, 5))
                absent = _absent(split, shown)
            image = scatter(rng, side, shown, 0.14, 0.2).image
            for pair, answer in ((rng.choice(shown), "yes"), (rng.choice(absent), "no")):
                yield Case(image, f"Is there {an(' '.join(pair))}?", answer, {"split": split})


def _absent(split: str, shown: Sequence[Pair]) -> list[Pair]:
    colours, shapes = {colour for colour, _ in shown}, {shape for _, shape in shown}
    return [
        (colour, shape)
        for colour, shape in ALL_PAIRS
        if (colour, shape) not in shown and (split == "random" or (colour in colours and shape in shapes))
    ]


def score_hallucination(replies: Sequence[Reply]) -> dict[str, Any]:
    """Return POPE's rates by split; `unclear` is the share of answers that are neither, which count as wrong."""
    return {
        split: _hallucination_rates([reply for reply in replies if reply.facts["split"] == split]) for split in SPLITS
    }


def _hallucination_rates(replies: Sequence[Reply]) -> dict[str, float | None]:
    said = [yes_or_no(reply.said) for reply in replies]
    true = [reply.answer == "yes" for reply in replies]
    return {
        **yes_no_rates([(bool(answer), label) for answer, label in zip(said, true, strict=True)]),
        "accuracy": sum(answer is label for answer, label in zip(said, true, strict=True)) / len(replies),
        "unclear": said.count(None) / len(replies),
    }


def spatial_cases(side: int, count: int, seed: int) -> Iterator[Case]:
    """Yield for `count` images of two objects per relation two questions, one true and one false."""
    for relation, (axis, direction) in RELATIONS.items():
        for number in range(count):
            rng = seeded(f"spatial {relation}", seed, number)
            pairs = list(zip(rng.sample(COLOURS, 2), rng.sample(SHAPES, 2), strict=True))
            gap = 0.0
            while abs(gap) < MIN_GAP * side:
                sheet = scatter(rng, side, pairs, 0.14, 0.24)
                a, b = sheet.objects
                gap = direction * (b.centre[axis] - a.centre[axis])
            for first, second, holds in ((a, b, gap > 0), (b, a, gap < 0)):
                question = f"Is the {first.shape} {relation} the {second.shape}?"
                facts = {"relation": relation, "picture": number}
                yield Case(sheet.image, question, "yes" if holds else "no", facts)


def score_spatial(replies: Sequence[Reply]) -> dict[str, Any]:
    """Return rates by relation and overall: accuracy, `swap` (both orders correct) and the share of yes."""
    return {
        **{relation: _spatial_rates([r for r in replies if r.facts["relation"] == relation]) for relation in RELATIONS},
        "all": _spatial_rates(replies),
    }


def _spatial_rates(replies: Sequence[Reply]) -> dict[str, float]:
    said = [yes_or_no(reply.said) for reply in replies]
    right = [answer is (reply.answer == "yes") for answer, reply in zip(said, replies, strict=True)]
    both = [first and second for first, second in zip(right[::2], right[1::2], strict=True)]
    return {
        "accuracy": sum(right) / len(right),
        "swap": sum(both) / len(both),
        "yes_ratio": sum(answer is True for answer in said) / len(said),
    }


def counting_cases(side: int, count: int, seed: int) -> Iterator[Case]:
    """Yield `count` images of each number of equal objects."""
    for true in COUNTS:
        for number in range(count):
            rng = seeded(f"counting {true}", seed, number)
            pair = rng.choice(ALL_PAIRS)
            image = scatter(rng, side, [pair] * true, 0.1, 0.15).image
            yield Case(image, f"How many {plural_of(pair[1])} are there?", str(true), {"count": true})


def number_in(said: str) -> int | None:
    """Return the first number in an answer, in digits or in a word up to twelve."""
    for word in re.findall(r"\d+|[a-z]+", said.lower()):
        if word.isdecimal():
            return int(word)
        if word in NUMBER_WORDS:
            return NUMBER_WORDS.index(word)
    return None


def score_counting(replies: Sequence[Reply]) -> dict[str, Any]:
    """Return by true count and overall: accuracy, mean absolute error and bias of the numbers, share without one."""
    by_count = {str(true): _count_errors([r for r in replies if r.facts["count"] == true]) for true in COUNTS}
    return {**by_count, "all": _count_errors(replies)}


def _count_errors(replies: Sequence[Reply]) -> dict[str, float | None]:
    said = [(number_in(reply.said), reply.facts["count"]) for reply in replies]
    off = [number - true for number, true in said if number is not None]
    return {
        "accuracy": off.count(0) / len(said),
        "error": sum(map(abs, off)) / len(off) if off else None,
        "bias": sum(off) / len(off) if off else None,
        "unclear": 1 - len(off) / len(said),
    }


HEIGHTS = (5, 6, 8, 10, 12, 16, 20, 24)  # pixels of a capital in the image, which AnyRes does not resize
FACTORS: dict[str, Sequence[Any]] = {
    "height": HEIGHTS,
    "known height": HEIGHTS,
    "rotation": (5, 15, 30, 45, 90),  # degrees, either way
    "face": FACES,
    "covered": (0.15, 0.3, 0.45),  # share of the word's width covered by thin bars of the board's colour
}
USUAL = 14  # height while another factor varies
KNOWN_WORDS = frozenset(words_of("shop", "train") + words_of("notice", "train"))  # on the signs of the training data
BOARDS = ("red", "green", "blue", "purple", "brown", "gray")
BAR = 3  # width in pixels


def reading_cases(side: int, count: int, seed: int) -> Iterator[Case]:
    """Yield `count` words for each value of each factor, with the other factors at their defaults.

    No training image shows these words, so they have to be spelled; `known height` takes words from training, in new
    images.
    """
    rest = {"height": USUAL, "rotation": 0, "face": FACES[0], "covered": 0.0}
    for factor, values in FACTORS.items():
        for value in values:
            for number in range(count):
                rng = seeded(f"reading {factor} {value}", seed, number)
                facts = {"factor": factor, **rest, factor.removeprefix("known "): value}
                if factor != "face":
                    facts["face"] = rng.choice(FACES)
                word = rng.choice(_fitting(KNOWN_WORDS if factor == "known height" else HELDOUT_WORDS, side, facts))
                yield Case(draw_sign(rng, side, word, facts), "What does the sign say?", word, facts)


def _fitting(words: frozenset[str], side: int, facts: dict[str, Any]) -> list[str]:
    shape = font(facts["face"], _font_size(facts["face"], facts["height"]))
    fitting = [word for word in sorted(words) if shape.getlength(word) < side - 16]
    return fitting or [min(words, key=lambda word: (len(word), word))]


def _font_size(face: str, height: int) -> int:
    """Return the font size whose capitals have a height in pixels."""
    top, bottom = font(face, 100).getbbox("H", anchor="ls")[1::2]
    return round(height * 100 / (bottom - top))


def draw_sign(rng: random.Random, side: int, word: str, facts: dict[str, Any]) -> Image.Image:
    """Draw a board that fills the image, with the word at a random position."""
    board = RGB[rng.choice(BOARDS)]
    image = Image.new("RGB", (side, side), BACKGROUND)
    image.paste(board, (4, 4, side - 4, side - 4))
    shape = font(facts["face"], _font_size(facts["face"], facts["height"]))
    left, top, right, bottom = map(int, shape.getbbox(word))
    mask = Image.new("L", (right - left + 2, bottom - top + 2), 0)
    pen = ImageDraw.Draw(mask)
    pen.text((1 - left, 1 - top), word, font=shape, fill=255)
    bars = round(facts["covered"] * mask.width / BAR)
    for bar in range(bars):
        start = round((bar + 0.5) * mask.width / bars - BAR / 2)
        pen.rectangle((start, 0, start + BAR - 1, mask.height), fill=0)
    angle = facts["rotation"] * rng.choice((1, -1))
    if angle:
        mask = mask.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    x, y = (rng.randint(6, max(6, side - 6 - length)) for length in mask.size)
    image.paste((255, 255, 255), (x, y), mask)
    return image


def score_reading(replies: Sequence[Reply]) -> dict[str, Any]:
    """Return by factor and value the share of words read, and the mean share of their characters."""
    table: dict[str, Any] = {}
    for factor in FACTORS:
        rows = [reply for reply in replies if reply.facts["factor"] == factor]
        varied = factor.removeprefix("known ")
        values = dict.fromkeys(reply.facts[varied] for reply in rows)
        table[factor] = {
            str(value): {
                "words": mean(read(r.said, r.answer) == 1 for r in rows if r.facts[varied] == value),
                "characters": mean(read(r.said, r.answer) for r in rows if r.facts[varied] == value),
            }
            for value in values
        }
    return table


def read(said: str, word: str) -> float:
    """Return 1 minus the smallest edit distance of an answer's word, as a share of the word's length; at least 0."""
    found = [_distance(other, word) for other in re.findall(r"\w+", said.upper())]
    return max(0.0, 1 - min(found, default=len(word)) / len(word))


def _distance(a: str, b: str) -> int:
    """Return the Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        above, row = row, [i]
        for j, right in enumerate(b, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (left != right)))
    return row[-1]
