"""Renderings: pixels, marks and answers agree, the same everywhere, and what is held out stays held out."""

from __future__ import annotations

import hashlib
import re

import numpy as np
import pytest

from anyres_vlm.geometry import Grid, Size, Tiling, plan_tiles
from anyres_vlm.synthetic.rendering import KINDS, Rendering, render
from anyres_vlm.synthetic.scenes import place_of
from anyres_vlm.synthetic.words import HELDOUT_OBJECTS, HELDOUT_WORDS, RGB

SEEDS = range(60)


def drawn_words(rendering: Rendering) -> list[str]:
    """Words read off the marks alone: letters and digits of one line, joined where they touch."""
    rows: dict[float, list] = {}
    for glyph in rendering.glyphs:
        if glyph.char.isalnum():
            top = next((known for known in rows if abs(known - glyph.box[1]) <= 3), glyph.box[1])
            rows.setdefault(top, []).append(glyph)
    words = []
    for row in rows.values():
        word, right = "", None
        for glyph in sorted(row, key=lambda mark: mark.box[0]):
            if right is not None and glyph.box[0] > right + 0.5:
                words.append(word)
                word = ""
            word, right = word + glyph.char, glyph.box[2]
        words.append(word)
    return words


@pytest.mark.parametrize("kind", KINDS)
def test_marks_lie_inside_and_where_there_is_ink(kind) -> None:
    for seed in SEEDS:
        rendering = render(kind, seed, "train")
        pixels = np.asarray(rendering.image).astype(int)
        height, width = pixels.shape[:2]
        assert 60 <= height <= 260
        assert 60 <= width <= 260
        for left, top, right, bottom in [mark.box for mark in (*rendering.glyphs, *rendering.objects)]:
            assert -1 <= left < right <= width + 1, (kind, seed)
            assert -1 <= top < bottom <= height + 1, (kind, seed)
            patch = pixels[max(int(top), 0) : int(bottom) + 1, max(int(left), 0) : int(right) + 1]
            assert np.ptp(patch.reshape(-1, 3), axis=0).max() > 60, "something stands out from its ground"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "scene"])
def test_read_answers_are_drawn(kind) -> None:
    for seed in SEEDS:
        rendering = render(kind, seed, "train")
        drawn = drawn_words(rendering)
        for question in rendering.questions:
            for word in question.answer.split():
                if word.isalpha():
                    assert word in drawn, (kind, seed, question, drawn)
                assert word in question.sentence


def test_scene_answers_follow_from_the_marks() -> None:
    for seed in range(200):
        rendering = render("scene", seed, "heldout")
        marks, (width, height) = rendering.objects, rendering.image.size
        assert 1 <= len(marks) <= 5
        for item in rendering.questions:
            words = re.findall(r"[a-z]+", item.question.lower())
            colours = [word for word in words if word in RGB]
            shapes = {mark.shape for mark in marks} | {"circle", "ring", "star"}
            named = [shape for shape in shapes if shape in words or shape + "s" in words or shape + "es" in words]
            if item.task == "count":
                matching = [m for m in marks if not colours or m.colour in colours]
                matching = [m for m in matching if not named or m.shape in named]
                assert item.answer == str(len(matching)), (seed, item)
            elif item.task == "colour":
                assert [m.colour for m in marks if m.shape in named] == [item.answer], (seed, item)
            elif item.task == "shape":
                assert [m.shape for m in marks if m.colour in colours] == [item.answer], (seed, item)
            elif item.task == "position":
                (mark,) = [m for m in marks if m.shape in named]
                assert place_of(mark, height, width) == item.answer
                x = mark.centre[1] / width
                assert ("left" in item.answer) == (x < 1 / 3)
                assert ("right" in item.answer) == (x > 2 / 3)


def test_yes_and_no_are_balanced() -> None:
    answers = [q.answer for seed in range(150) for q in render("scene", seed, "train").questions if q.task == "exists"]
    assert answers.count("yes") == answers.count("no")
    answers = [
        q.answer for seed in range(150) for q in render("scene", seed, "train").questions if q.task == "relation"
    ]
    assert 0.4 < answers.count("yes") / len(answers) < 0.6


def test_training_never_shows_what_is_held_out() -> None:
    heldout_words = heldout_objects = 0
    for kind in KINDS:
        for seed in SEEDS:
            for split in ("train", "heldout"):
                rendering = render(kind, seed, split)
                words = {word for word in drawn_words(rendering) if word in HELDOUT_WORDS}
                objects = {(m.colour, m.shape) for m in rendering.objects} & HELDOUT_OBJECTS
                if split == "train":
                    assert not words
                    assert not objects
                    assert not any(word in rendering.caption + rendering.detail for word in HELDOUT_WORDS)
                heldout_words += len(words)
                heldout_objects += len(objects)
    assert heldout_words > 100
    assert heldout_objects > 30


def test_the_same_arguments_give_the_same_picture() -> None:
    digest = hashlib.sha256()
    for kind in KINDS:
        first, again = render(kind, 5, "train"), render(kind, 5, "train")
        assert first.image.tobytes() == again.image.tobytes()
        assert (first.caption, first.questions) == (again.caption, again.questions)
        assert first.image.tobytes() != render(kind, 5, "heldout").image.tobytes()
        digest.update(first.caption.encode())
    # Sentences, unlike pixels, do not hang on the version of FreeType: they must not drift between machines.
    assert digest.hexdigest()[:16] == "0399ed1c9c980e27"


def test_all_canvases_are_used() -> None:
    tiling = Tiling.from_grid(Grid(2, 2), tile=84)
    sizes = [render(kind, seed, "train").image.size for kind in KINDS for seed in SEEDS]
    grids = {str(plan_tiles(Size(height=h, width=w), tiling).grid) for w, h in sizes}
    assert grids >= {"2x2", "1x2", "2x1", "3x1"}
