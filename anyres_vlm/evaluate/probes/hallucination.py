"""Object hallucination, as POPE asks: is there such an object? As often there as not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from anyres_vlm.evaluate.pope import yes_no_rates
from anyres_vlm.evaluate.probes.case import Case, Pair, Reply, all_pairs, draws, scatter, yes_or_no
from anyres_vlm.synthetic.facts import an

SPLITS = ("random", "adversarial")  # what is absent: any object, or one whose colour and shape are both in the picture


def cases(side: int, count: int, seed: int) -> Iterator[Case]:
    """`count` pictures a split, each with a question about an object that is there and one that is not."""
    for split in SPLITS:
        for number in range(count):
            rng = draws(f"hallucination {split}", seed, number)
            absent: list[Pair] = []
            while not absent:  # three objects of one colour leave none
                shown = rng.sample(all_pairs(), rng.randint(3, 5))
                absent = _absent(split, shown)
            image = scatter(rng, side, shown, 0.14, 0.2).image
            for pair, answer in ((rng.choice(shown), "yes"), (rng.choice(absent), "no")):
                yield Case(image, f"Is there {an(' '.join(pair))}?", answer, {"split": split})


def _absent(split: str, shown: Sequence[Pair]) -> list[Pair]:
    colours, shapes = {colour for colour, _ in shown}, {shape for _, shape in shown}
    return [
        (colour, shape)
        for colour, shape in all_pairs()
        if (colour, shape) not in shown and (split == "random" or (colour in colours and shape in shapes))
    ]


def score(replies: Sequence[Reply]) -> dict[str, Any]:
    """POPE's rates by split; `unclear` is the share of answers that are neither, which are wrong and no yes."""
    return {split: _rates([reply for reply in replies if reply.facts["split"] == split]) for split in SPLITS}


def _rates(replies: Sequence[Reply]) -> dict[str, float | None]:
    said = [yes_or_no(reply.said) for reply in replies]
    true = [reply.answer == "yes" for reply in replies]
    return {
        **yes_no_rates([(bool(answer), label) for answer, label in zip(said, true, strict=True)]),
        "accuracy": sum(answer is label for answer, label in zip(said, true, strict=True)) / len(replies),
        "unclear": said.count(None) / len(replies),
    }
