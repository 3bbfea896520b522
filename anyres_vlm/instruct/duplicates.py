"""Conversations that say nearly the same, found by MinHash."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from datasketch import MinHash, MinHashLSH
from numpy.typing import NDArray

from anyres_vlm.schema import Turn

PERMUTATIONS = 128  # similarities are known to about 0.04
SHINGLE = 3  # words


class NearDuplicates:
    """Keeps the first of each group. Deterministic: MinHash's permutations have a fixed seed."""

    def __init__(self, max_similarity: float) -> None:
        self._max = max_similarity
        self._index = MinHashLSH(threshold=max(max_similarity - 0.1, 0.1), num_perm=PERMUTATIONS)
        self._kept: dict[str, NDArray[np.uint32]] = {}

    def like(self, name: str, turns: Sequence[Turn]) -> str | None:
        """An earlier conversation that is as similar as the limit or more; without one, this one is kept."""
        sketch = MinHash(PERMUTATIONS)
        sketch.update_batch([shingle.encode() for shingle in sorted(_shingles(turns))])
        for other in sorted(self._index.query(sketch)):
            if np.mean(sketch.hashvalues == self._kept[other]) >= self._max:
                return str(other)
        self._index.insert(name, sketch)
        self._kept[name] = sketch.hashvalues
        return None


def _shingles(turns: Sequence[Turn]) -> set[str]:
    """Word triples of the answers."""
    words = " ".join(turn.text.lower() for turn in turns if turn.role == "assistant").split()
    return {" ".join(words[start : start + SHINGLE]) for start in range(max(len(words) - SHINGLE + 1, 1))}
