"""Near-duplicates against the exact similarity."""

from __future__ import annotations

import random

from anyres_vlm.instruct.duplicates import NearDuplicates
from anyres_vlm.schema import Turn


def turns(words: list[str]) -> list[Turn]:
    return [Turn("user", "What is there?"), Turn("assistant", " ".join(words))]


def triples(words: list[str]) -> set[tuple[str, ...]]:
    return set(zip(words, words[1:], words[2:], strict=False))


def test_the_decision_follows_the_exact_similarity() -> None:
    chance = random.Random(1)
    near = far = 0
    for trial in range(60):
        first = [f"w{chance.randrange(5000)}" for _ in range(120)]
        second = list(first)
        for place in chance.sample(range(120), chance.randrange(0, 30)):
            second[place] = f"new{place}"
        one, other = triples(first), triples(second)
        exact = len(one & other) / len(one | other)
        seen = NearDuplicates(0.7)
        assert seen.like("first", turns(first)) is None
        found = seen.like("second", turns(second))
        if exact > 0.85:  # nearly four standard deviations of 128 permutations
            near += 1
            assert found == "first", (trial, exact)
        if exact < 0.55:
            far += 1
            assert found is None, (trial, exact)
    assert near > 5
    assert far > 5


def test_texts_too_short_for_triples() -> None:
    seen = NearDuplicates(1.0)
    assert [seen.like(name, turns([word])) for name, word in (("a", "dog"), ("b", "cat"), ("c", "dog"))] == [
        None,
        None,
        "a",
    ]
