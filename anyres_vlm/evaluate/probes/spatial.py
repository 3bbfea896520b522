"""Spatial relations between two objects, each asked both ways round: a model that sees them changes its answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from anyres_vlm.evaluate.probes.case import Case, Reply, draws, scatter, yes_or_no
from anyres_vlm.synthetic.vocabulary import COLOURS, SHAPES

CLEARLY = 0.2  # of the side: centres at least this far apart along the axis that is asked about
AXIS = {"left of": (1, 1), "right of": (1, -1), "above": (0, 1), "below": (0, -1)}  # of (y, x), and its direction


def cases(side: int, count: int, seed: int) -> Iterator[Case]:
    """`count` pictures of two objects a relation, with two questions each, one true and one not."""
    for relation, (axis, direction) in AXIS.items():
        for number in range(count):
            rng = draws(f"spatial {relation}", seed, number)
            pairs = list(zip(rng.sample(COLOURS, 2), rng.sample(SHAPES, 2), strict=True))
            apart = 0.0
            while abs(apart) < CLEARLY * side:
                sheet = scatter(rng, side, pairs, 0.14, 0.24)
                a, b = sheet.objects
                apart = direction * (b.centre[axis] - a.centre[axis])
            for first, second, holds in ((a, b, apart > 0), (b, a, apart < 0)):
                question = f"Is the {first.shape} {relation} the {second.shape}?"
                facts = {"relation": relation, "picture": number}
                yield Case(sheet.image, question, "yes" if holds else "no", facts)


def score(replies: Sequence[Reply]) -> dict[str, Any]:
    """Accuracy by relation and in all; `swap`: the share of pictures with both questions right; the share of yes."""
    return {
        **{relation: _rates([r for r in replies if r.facts["relation"] == relation]) for relation in AXIS},
        "all": _rates(replies),
    }


def _rates(replies: Sequence[Reply]) -> dict[str, float]:
    said = [yes_or_no(reply.said) for reply in replies]
    right = [answer is (reply.answer == "yes") for answer, reply in zip(said, replies, strict=True)]
    both = [first and second for first, second in zip(right[::2], right[1::2], strict=True)]
    return {
        "accuracy": sum(right) / len(right),
        "swap": sum(both) / len(both),
        "yes_ratio": sum(answer is True for answer in said) / len(said),
    }
