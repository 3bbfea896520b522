"""Run probes on a checkpoint; reading is also run with the thumbnail only, the baseline for AnyRes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from anyres_vlm.evaluate.probes.case import Reply
from anyres_vlm.evaluate.probes.objects import COUNTING, HALLUCINATION, SPATIAL
from anyres_vlm.evaluate.probes.reading import READING, THUMBNAIL
from anyres_vlm.geometry import Grid
from anyres_vlm.inference.assistant import Assistant, Conversation
from anyres_vlm.inference.generation import Decoding
from anyres_vlm.schema import IMAGE_TOKEN, Turn
from anyres_vlm.synthetic.dialogue import BRIEFLY

PROBES = {"hallucination": HALLUCINATION, "spatial": SPATIAL, "counting": COUNTING, "reading": READING}
MAX_NEW_TOKENS = 32
CHUNK = 64  # images in memory at once


@dataclass(frozen=True)
class Probed:
    """One probe's scores and replies."""

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
    """Run probes with `count` images per value. `progress` is called with a probe and its number of answers."""

    def ask(name: str, title: str, asked: Assistant) -> Probed:
        side = 2 * asked.tiling.tile  # fills a 2x2 canvas pixel by pixel
        replies: list[Reply] = []
        drawn = PROBES[name].cases(side, count, seed)
        while cases := list(islice(drawn, CHUNK)):
            conversations = [
                Conversation([Turn("user", f"{IMAGE_TOKEN}\n{case.question} {BRIEFLY}")], [case.image])
                for case in cases
            ]
            answers = asked.answer_many(conversations, Decoding(MAX_NEW_TOKENS), batch_tokens)
            replies += [
                Reply(case.question, case.answer, case.facts, answer.text)
                for case, answer in zip(cases, answers, strict=True)
            ]
            progress(title, len(replies))
        return Probed(PROBES[name].score(replies), replies)

    results = {}
    for name in names:
        results[name] = ask(name, name, assistant)
        if name == "reading" and assistant.tiling.canvases:
            results[THUMBNAIL] = ask(name, THUMBNAIL, assistant.with_grid(Grid(1, 1)))
    return results
