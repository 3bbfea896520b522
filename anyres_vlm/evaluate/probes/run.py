"""Probes asked and scored; reading by the thumbnail alone as well, which is what AnyRes is measured against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from types import ModuleType
from typing import Any

from anyres_vlm.evaluate.probes import counting, hallucination, reading, spatial
from anyres_vlm.evaluate.probes.case import Reply
from anyres_vlm.geometry import Grid
from anyres_vlm.inference import Assistant, Conversation
from anyres_vlm.model.generation import Decoding
from anyres_vlm.schema import IMAGE_TOKEN, Turn
from anyres_vlm.synthetic.dialogue import BRIEFLY

PROBES: dict[str, ModuleType] = {
    "hallucination": hallucination,
    "spatial": spatial,
    "counting": counting,
    "reading": reading,
}
THUMBNAIL = "reading, thumbnail alone"
MAX_NEW_TOKENS = 32
AT_ONCE = 64  # pictures that are held in memory


@dataclass(frozen=True)
class Probed:
    """One probe's scores and the replies behind them."""

    scores: dict[str, Any]
    replies: list[Reply]


def run_probes(
    assistant: Assistant,
    names: Sequence[str],
    count: int,
    seed: int,
    batch_tokens: int,
    progress: Callable[[str, int], None],
) -> dict[str, Probed]:
    """Ask `count` pictures a value of what each probe varies. `progress` gets a probe and its answers so far."""
    results = {}
    for name in names:
        results[name] = _ask(assistant, name, name, count, seed, batch_tokens, progress)
        if name == "reading" and assistant.tiling.canvases:
            thumbnail = assistant.with_grid(Grid(1, 1))
            results[THUMBNAIL] = _ask(thumbnail, name, THUMBNAIL, count, seed, batch_tokens, progress)
    return results


def _ask(
    assistant: Assistant,
    name: str,
    title: str,
    count: int,
    seed: int,
    batch_tokens: int,
    progress: Callable[[str, int], None],
) -> Probed:
    side = 2 * assistant.tiling.tile  # fills a 2x2 canvas pixel by pixel
    replies: list[Reply] = []
    drawn = PROBES[name].cases(side, count, seed)
    while cases := list(islice(drawn, AT_ONCE)):
        asked = [
            Conversation([Turn("user", f"{IMAGE_TOKEN}\n{case.question} {BRIEFLY}")], [case.image]) for case in cases
        ]
        answers = assistant.answer_many(asked, Decoding(MAX_NEW_TOKENS), batch_tokens)
        replies += [
            Reply(case.question, case.answer, case.facts, answer.text)
            for case, answer in zip(cases, answers, strict=True)
        ]
        progress(title, len(replies))
    return Probed(PROBES[name].score(replies), replies)
