"""Counting one to twelve equal objects."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from anyres_vlm.evaluate.probes.case import Case, Reply, all_pairs, draws, scatter
from anyres_vlm.synthetic.facts import plural_of

COUNTS = range(1, 13)
WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()


def cases(side: int, count: int, seed: int) -> Iterator[Case]:
    """`count` pictures of each number."""
    for true in COUNTS:
        for number in range(count):
            rng = draws(f"counting {true}", seed, number)
            pair = rng.choice(all_pairs())
            image = scatter(rng, side, [pair] * true, 0.1, 0.15).image
            yield Case(image, f"How many {plural_of(pair[1])} are there?", str(true), {"count": true})


def number_in(said: str) -> int | None:
    """The first number that an answer names, in digits or in a word up to twelve."""
    for word in re.findall(r"\d+|[a-z]+", said.lower()):
        if word.isdecimal():
            return int(word)
        if word in WORDS:
            return WORDS.index(word)
    return None


def score(replies: Sequence[Reply]) -> dict[str, Any]:
    """By true count and in all: accuracy; mean absolute error and bias of the numbers said; `unclear`, the rest."""
    by_count = {str(true): _errors([r for r in replies if r.facts["count"] == true]) for true in COUNTS}
    return {**by_count, "all": _errors(replies)}


def _errors(replies: Sequence[Reply]) -> dict[str, float | None]:
    said = [(number_in(reply.said), reply.facts["count"]) for reply in replies]
    off = [number - true for number, true in said if number is not None]
    return {
        "accuracy": off.count(0) / len(said),
        "error": sum(map(abs, off)) / len(off) if off else None,
        "bias": sum(off) / len(off) if off else None,
        "unclear": 1 - len(off) / len(said),
    }
