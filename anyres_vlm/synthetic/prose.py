"""Plain text of the rendered world, for a language model that has never seen a picture."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from anyres_vlm.synthetic.dialogue import Dialogue, converse, pick_dialogue, pick_kind
from anyres_vlm.synthetic.rendering import Rendering, render
from anyres_vlm.synthetic.textonly import text_instruction

BLANK = "."
END = "</s>"


def passages(seed: int) -> Iterator[tuple[str, str]]:
    """Endless passages from training pictures alone, each what is given and what follows from it.

    Given is a picture's layout in words, or nothing; what follows is talk about it, a description, or questions and
    answers of all sorts.
    """
    for number in itertools.count():
        rng = random.Random(f"prose/{seed}/{number}")
        yield _passage(rng, seed * 1_000_000_007 + number)


def _passage(rng: random.Random, picture_seed: int) -> tuple[str, str]:
    choice = rng.random()
    if choice < 0.1:
        return "", talk([text_instruction(rng, "train") for _ in range(rng.randint(1, 3))])
    rendering = render(pick_kind(rng), picture_seed, "train")
    if choice < 0.13:
        return "", (rendering.caption if rng.random() < 0.5 else rendering.detail) + END
    layout = transcript(rendering, rng.randint(3, 12), rng.randint(3, 12))
    if rng.random() < 0.2:
        return f"{layout}\n", rendering.caption + END
    return f"User: {layout}\n", talk(converse(rendering, pick_dialogue(rng), rng)).removeprefix("User: ")


def talk(dialogue: Dialogue) -> str:
    """Turns as plain text, in the words of the `tiny` conversation template."""
    return "".join(f"User: {question} Assistant: {answer}{END}" for question, answer in dialogue)


def transcript(rendering: Rendering, rows: int, cols: int) -> str:
    """A picture as a grid of words: each cell the objects and characters that stand in it, `.` where none do.

    Objects stand where their centres lie, characters where they touch their line.
    """
    cells: list[list[list[str]]] = [[[] for _ in range(cols)] for _ in range(rows)]
    height, width = rendering.image.height, rendering.image.width
    marks = [(*mark.centre, f"{mark.colour} {mark.shape}") for mark in rendering.objects]
    marks += [(glyph.box[3], (glyph.box[0] + glyph.box[2]) / 2, glyph.char) for glyph in rendering.glyphs]
    for y, x, text in marks:
        cells[min(int(y / height * rows), rows - 1)][min(int(x / width * cols), cols - 1)].append(text)
    return "\n".join(" ".join(" ".join(cell) or BLANK for cell in row) for row in cells)
