"""A rendered picture with all that is true of it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import get_args

from PIL import Image

from anyres_vlm.config import PictureKind
from anyres_vlm.synthetic import documents, scenes
from anyres_vlm.synthetic.drawing import GlyphMark, ObjectMark, Sheet
from anyres_vlm.synthetic.words import Facts, Question, Split

KINDS: tuple[PictureKind, ...] = get_args(PictureKind)

_DRAW = {
    "scene": scenes.draw_scene,
    "sign": documents.draw_sign,
    "receipt": documents.draw_receipt,
    "table": documents.draw_table,
    "chart": documents.draw_chart,
    "page": documents.draw_page,
}


@dataclass(frozen=True)
class Rendering:
    """A picture, sentences about it, questions with exact answers, and the marks of what is drawn where."""

    kind: PictureKind
    image: Image.Image
    caption: str
    detail: str
    questions: tuple[Question, ...]
    reasoning: tuple[tuple[str, str], ...]
    glyphs: tuple[GlyphMark, ...]
    objects: tuple[ObjectMark, ...]


def render(kind: PictureKind, seed: int, split: Split) -> Rendering:
    """Draw one picture. The same arguments give the same pixels and sentences on every machine."""
    sheet, facts = _draw(kind, random.Random(f"{kind}/{seed}/{split}"), split)
    return Rendering(
        kind,
        sheet.image,
        facts.caption,
        facts.detail,
        tuple(facts.questions),
        tuple(facts.reasoning),
        tuple(sheet.glyphs),
        tuple(sheet.objects),
    )


def _draw(kind: PictureKind, rng: random.Random, split: Split) -> tuple[Sheet, Facts]:
    return _DRAW[kind](rng, split)
