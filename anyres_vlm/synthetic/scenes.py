"""Scenes: one to five coloured objects on a plain ground."""

from __future__ import annotations

import random
from itertools import permutations

from anyres_vlm.synthetic.drawing import Ink, ObjectMark, Sheet
from anyres_vlm.synthetic.words import COLOURS, HELDOUT_OBJECTS, SHAPES, Facts, Split, an, listing, plural, plural_of

GROUNDS: tuple[Ink, ...] = ((255, 255, 255), (246, 240, 226), (226, 236, 246), (228, 244, 228), (40, 42, 48))
PLACES = (
    ("top left", "top", "top right"),
    ("left", "middle", "right"),
    ("bottom left", "bottom", "bottom right"),
)
MARGIN = 0.04  # of a side: no centre lies closer to the border between two places
CLEARLY = 0.15  # of a side: centres this far apart are clearly left, right, above or below


def draw_scene(rng: random.Random, split: Split) -> tuple[Sheet, Facts]:
    """A scene and its facts."""
    sheet = Sheet(rng.randint(84, 200), rng.randint(84, 200), rng.choice(GROUNDS))
    for _ in range(rng.choice((1, 2, 2, 3, 3, 4, 5))):
        _place(sheet, *_object(rng, split), rng)
    return sheet, _facts(sheet, rng)


def place_of(mark: ObjectMark, height: int, width: int) -> str:
    """The name of the third of the picture in which an object's centre lies."""
    y, x = mark.centre
    return PLACES[int(3 * y / height)][int(3 * x / width)]


def _object(rng: random.Random, split: Split) -> tuple[str, str]:
    if split == "heldout" and rng.random() < 0.5:
        return rng.choice(sorted(HELDOUT_OBJECTS))
    while True:
        pair = rng.choice(COLOURS), rng.choice(SHAPES)
        if pair not in HELDOUT_OBJECTS:
            return pair


def _place(sheet: Sheet, colour: str, shape: str, rng: random.Random) -> None:
    """Draw the object where it overlaps nothing and its place is beyond doubt; leave it out if there is no room."""
    for _ in range(40):
        side = rng.randint(20, 40)
        left, top = rng.randint(2, sheet.width - side - 2), rng.randint(2, sheet.height - side - 2)
        shares = (top + side / 2) / sheet.height, (left + side / 2) / sheet.width
        doubtful = any(abs(share - border) < MARGIN for share in shares for border in (1 / 3, 2 / 3))
        if sheet.is_free(left, top, side) and not doubtful:
            sheet.object(colour, shape, left, top, side)
            return


def _facts(sheet: Sheet, rng: random.Random) -> Facts:
    marks = sorted(sheet.objects, key=lambda mark: (mark.centre[0] * 3 // sheet.height, mark.centre[1]))
    places = [place_of(mark, sheet.height, sheet.width) for mark in marks]
    names = [f"{mark.colour} {mark.shape}" for mark in marks]
    parts = [f"{an(name)} {_at(place)}" for name, place in zip(names, places, strict=True)]
    facts = Facts(caption=_sentence(listing(parts)))
    ground = "dark" if sum(sheet.background) < 300 else "light"
    count = plural(len(marks), "object")
    facts.detail = f"The picture shows {count} on a {ground} ground. There is {listing(parts)}."
    _ask_about_each(facts, marks, places, rng)
    _ask_counts(facts, marks, rng)
    _ask_existence(facts, marks, rng)
    _ask_relations(facts, sheet, marks, rng)
    rng.shuffle(facts.questions)
    return facts


def _at(place: str) -> str:
    return f"in the {place}" if place == "middle" else f"at the {place}"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _ask_about_each(facts: Facts, marks: list[ObjectMark], places: list[str], rng: random.Random) -> None:
    for mark, place in zip(marks, places, strict=True):
        colour, shape = mark.colour, mark.shape
        if sum(other.shape == shape for other in marks) == 1:
            wordings = [f"What colour is the {shape}?", f"Which colour does the {shape} have?"]
            facts.ask(rng, "colour", wordings, colour, f"The {shape} is {colour}.")
            wordings = [f"Where is the {shape}?", f"In which part of the picture is the {shape}?"]
            facts.ask(rng, "position", wordings, place, f"The {shape} is {_at(place)}.")
        if sum(other.colour == colour for other in marks) == 1:
            wordings = [f"What shape is the {colour} object?", f"What is the {colour} object?"]
            facts.ask(rng, "shape", wordings, shape, f"The {colour} object is {an(shape)}.")


def _ask_counts(facts: Facts, marks: list[ObjectMark], rng: random.Random) -> None:
    total = len(marks)
    wordings = ["How many objects are there?", "How many objects does the picture show?"]
    facts.ask(rng, "count", wordings, str(total), f"There {_are(total)} {plural(total, 'object')}.")
    mark = rng.choice(marks)
    same = sum(other.colour == mark.colour for other in marks)
    wordings = [f"How many {mark.colour} objects are there?"]
    facts.ask(
        rng,
        "count",
        wordings,
        str(same),
        f"There {_are(same)} {same} {mark.colour} object{'s' * (same > 1)}.",
    )
    alike = sum(other.shape == mark.shape for other in marks)
    wordings = [f"How many {plural_of(mark.shape)} are there?"]
    facts.ask(rng, "count", wordings, str(alike), f"There {_are(alike)} {plural(alike, mark.shape)}.")
    colours = sorted({mark.colour for mark in marks})
    for first, second in [*permutations(colours, 2)][:2]:
        a, b = (sum(mark.colour == colour for mark in marks) for colour in (first, second))
        result = "as many of both" if a == b else f"more {first} objects" if a > b else f"more {second} objects"
        facts.reasoning.append(
            (
                f"Are there more {first} or more {second} objects?",
                f"There {_are(a)} {a} {first} and {b} {second}, so there are {result}.",
            )
        )


def _ask_existence(facts: Facts, marks: list[ObjectMark], rng: random.Random) -> None:
    shown = {(mark.colour, mark.shape) for mark in marks}
    mark = rng.choice(marks)
    # The absent object shares its colour or its shape with one that is there: the answer needs both.
    near = [(mark.colour, shape) for shape in SHAPES] + [(colour, mark.shape) for colour in COLOURS]
    absent = rng.choice([pair for pair in near if pair not in shown])
    for (colour, shape), answer in (((mark.colour, mark.shape), "yes"), (absent, "no")):
        name = an(f"{colour} {shape}")
        wordings = [f"Is there {name}?", f"Does the picture show {name}?"]
        sentence = f"Yes, there is {name}." if answer == "yes" else f"No, there is no {colour} {shape}."
        facts.ask(rng, "exists", wordings, answer, sentence)


def _ask_relations(facts: Facts, sheet: Sheet, marks: list[ObjectMark], rng: random.Random) -> None:
    unique = [mark for mark in marks if sum(other.shape == mark.shape for other in marks) == 1]
    for a, b in permutations(unique, 2):
        down = (b.centre[0] - a.centre[0]) / sheet.height
        across = (b.centre[1] - a.centre[1]) / sheet.width
        relations = [("left of", across), ("right of", -across), ("above", down), ("below", -down)]
        word, distance = rng.choice(relations)
        if abs(distance) > CLEARLY:
            name, other = f"the {a.shape}", f"the {b.shape}"
            answer = "yes" if distance > 0 else "no"
            negation = "" if distance > 0 else "not "
            sentence = f"{answer.capitalize()}, {name} is {negation}{word} {other}."
            facts.ask(rng, "relation", [f"Is {name} {word} {other}?"], answer, sentence)
        if abs(across) > CLEARLY and len(facts.reasoning) < 4:
            first, last = (a, b) if across > 0 else (b, a)
            question = f"Which is further left, the {a.shape} or the {b.shape}?"
            answer = f"The {first.colour} {first.shape} comes before the {last.colour} {last.shape}"
            facts.reasoning.append((question, f"{answer}, so the {first.shape} is further left."))


def _are(count: int) -> str:
    return "is" if count == 1 else "are"
