"""The data that passes between the parts: a record as read, a sample as tokenised, a batch as tensors.

Letters of shapes in docstrings:

    T   tiles                          L  positions of a packed sequence
    S   tile side in pixels            K  supervised positions
    P   patches (tokens) of a tile     N  visual tokens of an image, newlines included
    Dv  width of the encoder           D  width of the language model
    V   vocabulary size                H  attention heads
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from anyres_vlm.geometry import TilePlan

if TYPE_CHECKING:  # start-up time: torch takes seconds to import, and only its types are needed
    import torch

IGNORE_INDEX = -100  # label of a position that is not supervised; the default of torch's cross-entropy
IMAGE_TOKEN = "<image>"

Role = Literal["user", "assistant"]


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation; `<image>` in the text stands for the next image of the record."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class ImageRef:
    """Where to read an encoded image: a file, a slice of a file (a tar member) or bytes in memory (a Parquet cell).

    `name` identifies it in messages. `offset` and `length` are in bytes; a length of None is up to the end of the file.
    """

    name: str
    path: Path | None = None
    offset: int = 0
    length: int | None = None
    data: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation as read from its source.

    `task` is what a held-out question tests. `system` replaces the template's default system text. `changes` names the
    corrections made on reading, which the summary of an index counts.
    """

    id: str
    images: tuple[ImageRef, ...]
    turns: tuple[Turn, ...]
    task: str = ""
    system: str = ""
    changes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """A tokenised record. An image is one token in `input_ids` and `total_tokens` of its plan in the model's sequence.

    `input_ids` and `labels` have the same shape; `images` and `plans` have one entry per image.
    """

    id: str
    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    images: tuple[ImageRef, ...]
    plans: tuple[TilePlan, ...]

    @property
    def length(self) -> int:
        """Number of positions in the language model's sequence."""
        return len(self.input_ids) + sum(plan.total_tokens - 1 for plan in self.plans)

    @property
    def num_tiles(self) -> int:
        """Number of tiles to encode."""
        return sum(plan.num_tiles for plan in self.plans)

    @property
    def num_supervised(self) -> int:
        """Number of labels that count in the loss. One at position 0 does not: no position before it predicts it."""
        return int(np.count_nonzero(self.labels[1:] != IGNORE_INDEX))


def token_repeats(ids: NDArray[np.int32], plans: Sequence[TilePlan], image_token_id: int) -> NDArray[np.int64]:
    """Return how often each token is repeated in the model's sequence: `total_tokens` for an image, else once. (n,)."""
    repeats = np.ones(len(ids), np.int64)
    repeats[ids == image_token_id] = [plan.total_tokens for plan in plans]
    return repeats


def supervision(labels: torch.Tensor, lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the supervised positions of a pack and the token that each predicts. (1, L) -> (K,), (K,).

    A position predicts the label of the next one; the last position of a document predicts nothing.
    """
    following = labels[0].roll(-1)
    following[np.cumsum(lengths) - 1] = IGNORE_INDEX
    positions = (following != IGNORE_INDEX).nonzero().squeeze(1)
    return positions, following[positions]


@dataclass(frozen=True, slots=True)
class Batch:
    """One pack of documents as tensors.

    `labels[i]` is the token at position i itself; `supervised` and `targets` hold the same labels as the loss uses
    them. `cu_seqlens` holds the boundaries of the documents, 0 and L included. `plans` has one plan per image, in the
    order of the tiles. What depends on the content of the tensors is computed before they are copied to the device.
    """

    input_ids: torch.Tensor  # (1, L) int64
    labels: torch.Tensor  # (1, L) int64
    position_ids: torch.Tensor  # (1, L) int64, restarting at 0 in each document
    cu_seqlens: torch.Tensor  # (documents + 1,) int32
    lengths: tuple[int, ...]  # of the documents
    supervised: torch.Tensor  # (K,) int64, positions that predict a label
    targets: torch.Tensor  # (K,) int64, the labels that they predict
    image_positions: torch.Tensor  # (N of all images,) int64
    tiles: torch.Tensor  # (T, 3, S, S) uint8
    plans: tuple[TilePlan, ...]
    sample_ids: tuple[str, ...]
    rejects: tuple[str, ...] = ()  # one reason per sample that was left out of this pack

    def to(self, device: torch.device) -> Batch:
        """Return the batch with its tensors on a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory, from which copies to a GPU overlap with computation."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        return replace(
            self,
            input_ids=change(self.input_ids),
            labels=change(self.labels),
            position_ids=change(self.position_ids),
            cu_seqlens=change(self.cu_seqlens),
            supervised=change(self.supervised),
            targets=change(self.targets),
            image_positions=change(self.image_positions),
            tiles=change(self.tiles),
        )

    @property
    def num_supervised(self) -> int:
        """Number of labels that count in the loss, so without the first position of each document."""
        return len(self.targets)

    @property
    def num_pairs(self) -> int:
        """Number of (query, visible key) pairs: each token attends to itself and those before it in its document."""
        return sum(length * (length + 1) for length in self.lengths) // 2
