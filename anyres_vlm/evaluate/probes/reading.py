"""Probe of reading one word, by height, rotation, typeface and covered share; by height also with known words."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from statistics import mean
from typing import Any

from PIL import Image, ImageDraw

from anyres_vlm.evaluate.probes.case import BACKGROUND, Case, Probe, Reply, seeded
from anyres_vlm.synthetic.drawing import FACES, font
from anyres_vlm.synthetic.words import HELDOUT_WORDS, RGB, words_of

HEIGHTS = (5, 6, 8, 10, 12, 16, 20, 24)  # pixels of a capital in the image, which AnyRes does not resize
ROTATIONS = (5, 15, 30, 45, 90)  # degrees, either way
COVERED = (0.15, 0.3, 0.45)  # share of the word's width covered by thin bars of the board's colour
USUAL = 14  # height while another factor varies
FACTORS = ("height", "known height", "rotation", "face", "covered")
KNOWN_WORDS = frozenset(words_of("shop", "train") + words_of("notice", "train"))  # on the signs of the training data
BOARDS = ("red", "green", "blue", "purple", "brown", "gray")
BAR = 3  # width in pixels
THUMBNAIL = "reading, thumbnail alone"  # key in probes.json of the run without tiles


def reading_cases(side: int, count: int, seed: int) -> Iterator[Case]:
    """Yield `count` words for each value of each factor, with the other factors at their defaults.

    No training image shows these words, so they have to be spelled; `known height` takes words from training, in new
    images.
    """
    rest = {"height": USUAL, "rotation": 0, "face": FACES[0], "covered": 0.0}
    sweeps = {"height": HEIGHTS, "known height": HEIGHTS, "rotation": ROTATIONS, "face": FACES, "covered": COVERED}
    for factor in FACTORS:
        for value in sweeps[factor]:
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


READING = Probe(reading_cases, score_reading)
