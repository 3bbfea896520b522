"""Instructions without a picture: small families of questions with exact answers."""

from __future__ import annotations

import random

from anyres_vlm.synthetic.words import HELDOUT_WORDS, WORDS, Split

OPPOSITES = (
    "hot cold, big small, day night, up down, open closed, fast slow, light dark, old new, full empty, left right, "
    "high low, wet dry, early late, hard soft, loud quiet, long short"
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
THINGS = {
    "grass": "green",
    "snow": "white",
    "a lemon": "yellow",
    "the sky": "blue",
    "a tomato": "red",
    "coal": "black",
}
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def text_instruction(rng: random.Random, split: Split) -> tuple[str, str]:
    """A question and its answer in a sentence. Sums whose operands add up to a multiple of 7 are held out."""
    family = rng.choice((_sum, _difference, _opposite, _spell, _letters, _next_letter, _next_day, _larger, _colour))
    return family(rng, split)


def _operands(rng: random.Random, split: Split) -> tuple[int, int]:
    while True:
        a, b = rng.randint(2, 49), rng.randint(2, 49)
        if ((a + b) % 7 == 0) == (split == "heldout"):
            return a, b


def _sum(rng: random.Random, split: Split) -> tuple[str, str]:
    a, b = _operands(rng, split)
    return f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."


def _difference(rng: random.Random, split: Split) -> tuple[str, str]:
    b, a = sorted(_operands(rng, split))
    return f"What is {a} minus {b}?", f"{a} minus {b} is {a - b}."


def _opposite(rng: random.Random, split: Split) -> tuple[str, str]:
    pair = rng.choice(OPPOSITES.split(", ")).split()
    rng.shuffle(pair)
    return f"What is the opposite of {pair[0]}?", f"The opposite of {pair[0]} is {pair[1]}."


def _word(rng: random.Random, split: Split) -> str:
    words = [word for group in WORDS.values() for word in group if (word in HELDOUT_WORDS) == (split == "heldout")]
    return rng.choice(words)


def _spell(rng: random.Random, split: Split) -> tuple[str, str]:
    word = _word(rng, split)
    if rng.random() < 0.5:
        return f"Which word is spelled {' '.join(word)}?", f"It spells {word}."
    return f"How do you spell {word}?", f"{word} is spelled {' '.join(word)}."


def _letters(rng: random.Random, split: Split) -> tuple[str, str]:
    word = _word(rng, split)
    return (
        f"What are the first and last letters of {word}?",
        f"{word} begins with {word[0]} and ends with {word[-1]}.",
    )


def _next_letter(rng: random.Random, split: Split) -> tuple[str, str]:
    place = rng.randrange(25)
    return (
        f"Which letter comes after {ALPHABET[place]}?",
        f"After {ALPHABET[place]} comes {ALPHABET[place + 1]}.",
    )


def _next_day(rng: random.Random, split: Split) -> tuple[str, str]:
    place = rng.randrange(7)
    return f"Which day comes after {DAYS[place]}?", f"After {DAYS[place]} comes {DAYS[(place + 1) % 7]}."


def _larger(rng: random.Random, split: Split) -> tuple[str, str]:
    a, b = rng.sample(range(2, 100), 2)
    return f"Which is larger, {a} or {b}?", f"{max(a, b)} is larger than {min(a, b)}."


def _colour(rng: random.Random, split: Split) -> tuple[str, str]:
    thing, colour = rng.choice([*THINGS.items()])
    return f"What colour is {thing}?", f"The colour of {thing} is {colour}."
