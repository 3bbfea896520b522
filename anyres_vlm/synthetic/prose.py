"""Plain text of the rendered world, for a language model that has never seen a picture."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from anyres_vlm.geometry import Size, TilePlan, Tiling, plan_tiles
from anyres_vlm.synthetic.dialogue import Dialogue, converse, pick_dialogue, pick_kind
from anyres_vlm.synthetic.rendering import Rendering, render
from anyres_vlm.synthetic.textonly import text_instruction

BLANK = "."
END = "</s>"

Window = tuple[float, float, float, float]  # left, top, right, bottom in the picture's pixels


def passages(seed: int, tiling: Tiling) -> Iterator[tuple[str, str]]:
    """Endless passages from training pictures alone, each what is given and what follows from it.

    Given is a picture's layout in words, or nothing; what follows is talk about it, a description, or questions and
    answers of all sorts.
    """
    for number in itertools.count():
        rng = random.Random(f"prose/{seed}/{number}")
        yield _passage(rng, seed * 1_000_000_007 + number, tiling)


def _passage(rng: random.Random, picture_seed: int, tiling: Tiling) -> tuple[str, str]:
    choice = rng.random()
    if choice < 0.1:
        return "", talk([text_instruction(rng, "train") for _ in range(rng.randint(1, 3))])
    rendering = render(pick_kind(rng), picture_seed, "train")
    if choice < 0.13:
        return "", (rendering.caption if rng.random() < 0.5 else rendering.detail) + END
    plan = plan_tiles(Size(height=rendering.image.height, width=rendering.image.width), tiling)
    # Text is not legible on a thumbnail's cells, objects are.
    with_grid = bool(rendering.glyphs) or rng.random() < 0.5
    layout = transcript(rendering, plan, thumbnail=not with_grid or rng.random() < 0.5, grid=with_grid)
    if rng.random() < 0.15:
        return f"{layout}\n", rendering.caption + END
    return f"User: {layout}\n", talk(converse(rendering, pick_dialogue(rng), rng)).removeprefix("User: ")


def talk(dialogue: Dialogue) -> str:
    """Turns as plain text, in the words of the `tiny` conversation template."""
    return "".join(f"User: {question} Assistant: {answer}{END}" for question, answer in dialogue)


def transcript(rendering: Rendering, plan: TilePlan, *, thumbnail: bool = True, grid: bool = True) -> str:
    """A picture in words, in the order of its patches: the thumbnail's on one line, then the grid's, a row a line."""
    cells = []
    if thumbnail:
        height, width = plan.image.height / plan.side, plan.image.width / plan.side
        for row, col in itertools.product(range(plan.side), range(plan.side)):
            cells.append(_cell(rendering, (col * width, row * height, (col + 1) * width, (row + 1) * height)))
    lines = [" ".join(cells)] if thumbnail else []
    if grid:
        patch = plan.tile / plan.side
        height, width = patch * plan.image.height / plan.resized.height, patch * plan.image.width / plan.resized.width
        first_row, first_col = plan.kept_top - plan.top / patch, plan.kept_left - plan.left / patch
        for row in range(plan.kept_rows):
            top = (first_row + row) * height
            lefts = [(first_col + col) * width for col in range(plan.kept_cols)]
            lines.append(" ".join(_cell(rendering, (left, top, left + width, top + height)) for left in lefts))
    return "\n".join(lines)


def _cell(rendering: Rendering, window: Window) -> str:
    """The object that covers the window's middle or has its own there, and the characters centred in it."""
    left, top, right, bottom = window
    y, x = (top + bottom) / 2, (left + right) / 2
    words = []
    for mark in rendering.objects:
        covers = mark.box[0] <= x < mark.box[2] and mark.box[1] <= y < mark.box[3]
        if covers or (top <= mark.centre[0] < bottom and left <= mark.centre[1] < right):
            words.append(f"{mark.colour} {mark.shape}")
    for glyph in rendering.glyphs:
        glyph_x, glyph_y = (glyph.box[0] + glyph.box[2]) / 2, (glyph.box[1] + glyph.box[3]) / 2
        if left <= glyph_x < right and top <= glyph_y < bottom:
            words.append(glyph.char)
    return " ".join(words) or BLANK
