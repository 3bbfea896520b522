"""What a pack holds, as far as its memory goes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PackSize:
    """Positions of the sequence, equal documents in it, tiles for the encoder, supervised positions."""

    tokens: int
    documents: int
    tiles: int
    supervised: int

    @property
    def lengths(self) -> list[int]:
        """Of the documents; the last takes what is left."""
        each = self.tokens // self.documents
        return [each] * (self.documents - 1) + [self.tokens - each * (self.documents - 1)]
