"""From lengths to optimizer steps: so many samples a step, packed into as few packs as fit the capacity."""

from __future__ import annotations

import random
from collections.abc import Sequence

from anyres_vlm.errors import UsageError

Pack = list[int]  # sample indices


def pack_steps(lengths: Sequence[int], batch_size: int, capacity: int, seed: int, epoch: int) -> list[list[Pack]]:
    """Shuffle by (seed, epoch), cut into batches, pack each one first-fit decreasing. Steps of packs of sample indices.

    Every sample appears once; the last step holds what is left. Raises `UsageError` for a sample above the capacity.
    """
    longest = max(lengths, default=0)
    if longest > capacity:
        raise UsageError(f"a sample of {longest} tokens exceeds capacity={capacity}: raise it to at least {longest}")
    order = list(range(len(lengths)))
    random.Random(f"packing/{seed}/{epoch}").shuffle(order)
    return [
        _first_fit(order[start : start + batch_size], lengths, capacity) for start in range(0, len(order), batch_size)
    ]


def _first_fit(samples: Sequence[int], lengths: Sequence[int], capacity: int) -> list[Pack]:
    packs: list[Pack] = []
    free: list[int] = []
    for sample in sorted(samples, key=lambda index: (-lengths[index], index)):
        place = next((index for index, room in enumerate(free) if room >= lengths[sample]), None)
        if place is None:
            packs.append([])
            free.append(capacity)
            place = len(packs) - 1
        packs[place].append(sample)
        free[place] -= lengths[sample]
    return packs
