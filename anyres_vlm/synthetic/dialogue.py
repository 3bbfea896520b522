"""Conversations about a picture, in the three kinds of LLaVA's instruction data."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

from anyres_vlm.config import PictureKind
from anyres_vlm.synthetic.rendering import KINDS, Rendering

DialogueKind = Literal["conversation", "detail", "reasoning"]
Dialogue = list[tuple[str, str]]  # (question, answer) in turn

BRIEFLY = "Answer briefly."
DETAIL_WORDINGS = (
    "Describe the picture in detail.",
    "What do you see?",
    "Give a full description of the picture.",
)
_KIND_WEIGHTS = (45, 15, 10, 10, 10, 10)  # in the order of KINDS: half of the pictures are scenes


def pick_kind(rng: random.Random, kinds: Sequence[PictureKind] | None = None) -> PictureKind:
    """One of the kinds of picture; without any, a kind in the mix of the embedded default."""
    if kinds is not None:
        return rng.choice(kinds)
    return rng.choices(KINDS, _KIND_WEIGHTS)[0]


def pick_dialogue(rng: random.Random) -> DialogueKind:
    """A kind of dialogue in the mix of the embedded default."""
    kinds: tuple[DialogueKind, ...] = ("conversation", "detail", "reasoning")
    return rng.choices(kinds, (70, 12, 18))[0]


def converse(rendering: Rendering, kind: DialogueKind, rng: random.Random, brief_share: float = 0.6) -> Dialogue:
    """Turns of one kind: 3 to 8 questions, a detailed description, or an answer with its reasons.

    `brief_share` of the questions ask for brief answers; the others are answered in sentences.
    """
    if kind == "detail":
        return [(rng.choice(DETAIL_WORDINGS), rendering.detail)]
    if kind == "reasoning" and rendering.reasoning:
        return [rng.choice(rendering.reasoning)]
    asked = rng.sample(rendering.questions, min(len(rendering.questions), rng.randint(3, 8)))
    brief = [rng.random() < brief_share for _ in asked]
    return [
        (f"{item.question} {BRIEFLY}", item.answer) if short else (item.question, item.sentence)
        for item, short in zip(asked, brief, strict=True)
    ]
