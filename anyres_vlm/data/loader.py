"""Packs to batches, ahead of the step that needs them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from anyres_vlm.data.images import open_image
from anyres_vlm.data.packing import Pack
from anyres_vlm.data.tiling import cut_tiles
from anyres_vlm.errors import DataError
from anyres_vlm.geometry import Size, TilePlan
from anyres_vlm.schema import IGNORE_INDEX, Batch, Sample


def token_repeats(ids: NDArray[np.int32], plans: Sequence[TilePlan], image_token_id: int) -> NDArray[np.int64]:
    """How often each token stands in the model's sequence: an image as often as its plan has tokens."""
    repeats = np.ones(len(ids), np.int64)
    repeats[ids == image_token_id] = [plan.total_tokens for plan in plans]
    return repeats


def collate(samples: Sequence[Sample], tile: int, image_token_id: int) -> Batch:
    """Read the images and lay the samples of one pack behind one another; no sample is one unsupervised token."""
    ids: list[NDArray[Any]] = []
    labels: list[NDArray[Any]] = []
    positions: list[NDArray[Any]] = []
    tiles = [np.zeros((0, 3, tile, tile), np.uint8)]
    for sample in samples:
        repeats = token_repeats(sample.input_ids, sample.plans, image_token_id)
        ids.append(np.repeat(sample.input_ids, repeats))
        labels.append(np.repeat(sample.labels, repeats))
        positions.append(np.arange(len(ids[-1])))
        tiles += [load_tiles(sample, index) for index in range(len(sample.plans))]
    if not samples:
        ids, labels, positions = [np.zeros(1)], [np.full(1, IGNORE_INDEX)], [np.zeros(1)]
    return Batch(
        input_ids=_row(ids),
        labels=_row(labels),
        position_ids=_row(positions),
        cu_seqlens=torch.from_numpy(np.cumsum([0, *map(len, ids)])).to(torch.int32),
        tiles=torch.from_numpy(np.concatenate(tiles)),
        plans=tuple(plan for sample in samples for plan in sample.plans),
        sample_ids=tuple(sample.id for sample in samples),
    )


def load_tiles(sample: Sample, index: int) -> NDArray[np.uint8]:
    """Tiles of one of a sample's images, (T, 3, S, S). Raises `DataError` if the file changed since it was planned."""
    reference, plan = sample.images[index], sample.plans[index]
    image = open_image(reference)
    if Size(height=image.height, width=image.width) != plan.image:
        raise DataError(
            f"{reference.name} (record {sample.id}): its size is {image.width}x{image.height}, planned were "
            f"{plan.image.width}x{plan.image.height}: it changed since the run began"
        )
    return cut_tiles(image, plan)


def iter_steps(
    samples: Sequence[Sample],
    steps: Sequence[Sequence[Pack]],
    first_step: int,
    *,
    tile: int,
    image_token_id: int,
    rank: int,
    world_size: int,
    workers: int,
) -> Iterator[list[Batch]]:
    """For each optimizer step from `first_step` on, this rank's batches.

    Packs are dealt to the ranks in turn. Where they do not divide evenly, the ranks that go short get a batch of one
    unsupervised token, so that all ranks run the same number of passes.
    """
    shares: list[list[Pack]] = []
    for packs in steps[first_step:]:
        passes = -(-len(packs) // world_size)
        mine = [list(pack) for pack in packs[rank::world_size]]
        shares.append(mine + [[]] * (passes - len(mine)))
    dataset = _PackDataset(samples, [pack for share in shares for pack in share], tile, image_token_id)
    batches = iter(DataLoader(dataset, batch_size=None, num_workers=workers, shuffle=False))
    for share in shares:
        yield [_unwrap(next(batches)) for _ in share]


class _PackDataset(Dataset[Batch | str]):
    """Batches by pack; a bad file comes back as its message, for an exception of a worker loses its type."""

    def __init__(self, samples: Sequence[Sample], packs: Sequence[Pack], tile: int, image_token_id: int) -> None:
        self.samples, self.packs, self.tile, self.image_token_id = samples, packs, tile, image_token_id

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> Batch | str:
        try:
            return collate([self.samples[sample] for sample in self.packs[index]], self.tile, self.image_token_id)
        except DataError as error:
            return str(error)


def _unwrap(batch: Batch | str) -> Batch:
    if isinstance(batch, str):
        raise DataError(batch)
    return batch


def _row(parts: Sequence[NDArray[Any]]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))[None]
