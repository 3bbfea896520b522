"""Run probes on a checkpoint; reading is also run with the thumbnail only, the baseline for AnyRes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from anyres_vlm.evaluate.probes import cases
from anyres_vlm.evaluate.probes.cases import THUMBNAIL, Case, Reply
from anyres_vlm.geometry import Grid
from anyres_vlm.inference.assistant import Assistant, Conversation
from anyres_vlm.inference.generation import Decoding
from anyres_vlm.schema import IMAGE_TOKEN, Turn
from anyres_vlm.synthetic.dialogue import BRIEFLY

MAX_NEW_TOKENS = 32
CHUNK = 64  # images in memory at once


@dataclass(frozen=True)
class Probe:
    """One failure mode. `cases` takes the side of the image in pixels, the images per value, and a seed."""

    cases: Callable[[int, int, int], Iterator[Case]]
    score: Callable[[Sequence[Reply]], dict[str, Any]]


PROBES = {
    "hallucination": Probe(cases.hallucination_cases, cases.score_hallucination),
    "spatial": Probe(cases.spatial_cases, cases.score_spatial),
    "counting": Probe(cases.counting_cases, cases.score_counting),
    "reading": Probe(cases.reading_cases, cases.score_reading),
}


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
        while chunk := list(islice(drawn, CHUNK)):
            conversations = [
                Conversation([Turn("user", f"{IMAGE_TOKEN}\n{case.question} {BRIEFLY}")], [case.image])
                for case in chunk
            ]
            answers = asked.answer_many(conversations, Decoding(MAX_NEW_TOKENS), batch_tokens)
            replies += [
                Reply(case.question, case.answer, case.facts, answer.text)
                for case, answer in zip(chunk, answers, strict=True)
            ]
            progress(title, len(replies))
        return Probed(PROBES[name].score(replies), replies)

    results = {}
    for name in names:
        results[name] = ask(name, name, assistant)
        if name == "reading" and assistant.tiling.canvases:
            results[THUMBNAIL] = ask(name, THUMBNAIL, assistant.with_grid(Grid(1, 1)))
    return results
