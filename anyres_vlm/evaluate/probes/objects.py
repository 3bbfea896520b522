"""Probes of objects: hallucination as in POPE, spatial relations in both orders, and counting from one to twelve."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

from anyres_vlm.evaluate.benchmarks.pope import yes_no_rates
from anyres_vlm.evaluate.probes.case import BACKGROUND, Case, Probe, Reply, seeded, yes_or_no
from anyres_vlm.synthetic.drawing import Sheet
from anyres_vlm.synthetic.words import COLOURS, SHAPES, an, plural_of

Pair = tuple[str, str]
"""A colour and a shape."""

ALL_PAIRS: list[Pair] = [(colour, shape) for colour in COLOURS for shape in SHAPES]
# What is absent: any object, or one whose colour and shape both occur in the image.
SPLITS = ("random", "adversarial")
MIN_GAP = 0.2  # of the side: centres are at least this far apart along the axis of the question
RELATIONS = {"left of": (1, 1), "right of": (1, -1), "above": (0, 1), "below": (0, -1)}  # axis of (y, x), direction
COUNTS = range(1, 13)
NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()


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


HALLUCINATION = Probe(hallucination_cases, score_hallucination)
SPATIAL = Probe(spatial_cases, score_spatial)
COUNTING = Probe(counting_cases, score_counting)
