"""What flows between the parts: a record as read, a sample as tokenised, a pack as planned, a batch as computed.

Legend of shape letters, used by every docstring:

    T tiles            S tile side in pixels      P patches of a tile (tokens)   L positions of a packed sequence
    N visual tokens of one image, newlines included                             K supervised positions
    Dv width of the encoder     D width of the language model     V vocabulary   H attention heads
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from anyres_vlm.geometry import TilePlan

if TYPE_CHECKING:  # torch takes seconds to import and a schema needs only its names
    import torch

IGNORE_INDEX = -100  # a label that is not supervised; the default of torch's cross-entropy
IMAGE_TOKEN = "<image>"

Role = Literal["user", "assistant"]


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation; `<image>` in the text stands for the next image of the record."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class ImageRef:
    """Where an encoded image lies: a whole file, a slice of a file (a tar member), or bytes in memory (a Parquet cell).

    `name` is what messages call it. `length` is in bytes; None reads to the end of the file.
    """

    name: str
    path: Path | None = None
    offset: int = 0
    length: int | None = None
    data: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation as read from its source.

    `task` names what a held-out question tests; `system` replaces the template's default system text; `changes` lists
    what reading changed, for the summary of an index.
    """

    id: str
    images: tuple[ImageRef, ...]
    turns: tuple[Turn, ...]
    task: str = ""
    system: str = ""
    changes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """A tokenised record. An image is one token in `input_ids`, and `plan.total_tokens` in the model's sequence."""

    id: str
    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    images: tuple[ImageRef, ...]
    plans: tuple[TilePlan, ...]

    @property
    def length(self) -> int:
        """Positions in the language model's sequence."""
        return len(self.input_ids) + sum(plan.total_tokens - 1 for plan in self.plans)

    @property
    def num_tiles(self) -> int:
        """Tiles for the encoder."""
        return sum(plan.num_tiles for plan in self.plans)

    @property
    def num_supervised(self) -> int:
        """Positions whose prediction counts in the loss: a label at position 0 has nothing before it to predict it."""
        return int(np.count_nonzero(self.labels[1:] != IGNORE_INDEX))


def token_repeats(ids: NDArray[np.int32], plans: Sequence[TilePlan], image_token_id: int) -> NDArray[np.int64]:
    """How often each token stands in the model's sequence: an image as often as its plan has tokens."""
    repeats = np.ones(len(ids), np.int64)
    repeats[ids == image_token_id] = [plan.total_tokens for plan in plans]
    return repeats


@dataclass(frozen=True, slots=True)
class Batch:
    """One pack of documents as tensors.

    `labels[i]` is the token at position i itself; the loss shifts inside each document. `cu_seqlens` holds the
    documents' boundaries, 0 and L included; `plans` one plan an image in the order of the tiles.
    """

    input_ids: torch.Tensor  # (1, L) int64
    labels: torch.Tensor  # (1, L) int64
    position_ids: torch.Tensor  # (1, L) int64, from 0 in each document
    cu_seqlens: torch.Tensor  # (documents + 1,) int32
    tiles: torch.Tensor  # (T, 3, S, S) uint8
    plans: tuple[TilePlan, ...]
    sample_ids: tuple[str, ...]
    rejects: tuple[str, ...] = ()  # why samples of this pack were left out

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which copies to a GPU overlap with work."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        return replace(
            self,
            input_ids=change(self.input_ids),
            labels=change(self.labels),
            position_ids=change(self.position_ids),
            cu_seqlens=change(self.cu_seqlens),
            tiles=change(self.tiles),
        )

    @property
    def num_supervised(self) -> int:
        """Supervised positions, the first of each document not counted."""
        labels = self.labels[0].clone()
        labels[self.cu_seqlens[:-1].long()] = IGNORE_INDEX
        return int((labels != IGNORE_INDEX).sum())

    @property
    def num_pairs(self) -> int:
        """Pairs of a token and one that it sees: itself and those before it in its document."""
        lengths = self.cu_seqlens.diff().long()
        return int((lengths * (lengths + 1)).sum()) // 2
