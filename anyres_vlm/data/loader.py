"""Load the packs of a run: records of an indexed source become batches of tensors.

`iter_steps` yields the batches of each optimizer step; its worker processes read records and images, cut tiles
(`load`) and concatenate the samples of a pack (`collate`).
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from anyres_vlm.config import DataConfig, TilingMode
from anyres_vlm.data.blobs import read_blob
from anyres_vlm.data.conversation import ConversationTokenizer
from anyres_vlm.data.index.table import Index
from anyres_vlm.data.sources import Source
from anyres_vlm.data.tiling import Augmentation, Pixels, tile_image
from anyres_vlm.errors import DataError, check_bad_records
from anyres_vlm.geometry import Tiling, plan_tiles
from anyres_vlm.schema import IGNORE_INDEX, Batch, Sample, supervision, token_repeats

logger = logging.getLogger(__name__)
Loaded = tuple[Sample, list[NDArray[np.uint8]]]  # a sample, and the tiles of each of its images, (T, 3, S, S)


def iter_steps(
    samples: IndexedSamples,
    shares: Sequence[Sequence[Pack]],
    data: DataConfig,
    seed: int,
    *,
    workers: int,
    pin_memory: bool,
) -> Iterator[list[Batch]]:
    """Yield this rank's batches of each optimizer step, one per pack of its share. `seed` is for augmentation.

    A sample that can no longer be read is left out of its pack and logged; the other samples do not change. Raises
    `DataError` once more than `data.max_bad_fraction` of this rank's samples are unreadable.
    """
    dataset = PackDataset(samples, [pack for share in shares for pack in share], data, seed)
    num_samples = sum(len(pack.positions) for pack in dataset.packs)
    loader = DataLoader(
        dataset, batch_size=None, num_workers=workers, worker_init_fn=_start_worker, pin_memory=pin_memory
    )
    batches = iter(loader)
    num_rejected = 0
    for share in shares:
        step = [next(batches) for _ in share]
        for reject in (reject for batch in step for reject in batch.rejects):
            num_rejected += 1
            logger.warning("sample left out: %s", reject)
            details, remedy = f"the last one: {reject}", "fix them or raise max_bad_fraction"
            check_bad_records(num_rejected, num_samples, data.max_bad_fraction, details, remedy)
        yield step


class PackDataset(Dataset[Batch]):
    """One batch per pack. Unreadable samples are reported in the batch, as exceptions of workers lose their type."""

    def __init__(self, samples: IndexedSamples, packs: Sequence[Pack], data: DataConfig, seed: int) -> None:
        self.samples, self.packs, self.seed, self.mode = samples, packs, seed, data.tiling_mode
        self.augmentation = None if data.augment is None else Augmentation(data.augment)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> Batch:
        loaded: list[Loaded] = []
        rejects: list[str] = []
        epoch, positions = self.packs[index]
        for position in positions.tolist():
            change = None if self.augmentation is None else partial(self._augment, epoch, position)
            try:
                loaded.append(load(self.samples.sample(position), self.mode, change))
            except DataError as error:
                rejects.append(str(error))
        return collate(loaded, self.samples.tiling.tile, self.samples.conversation.image_token_id, rejects)

    def _augment(self, epoch: int, position: int, number: int, pixels: Pixels) -> Pixels:
        assert self.augmentation is not None
        return self.augmentation(pixels, (self.seed, epoch, position, number))


class Pack(NamedTuple):
    """The samples of one packed sequence: their positions in the index, and the epoch, which seeds augmentation."""

    epoch: int
    positions: NDArray[np.int64]


@dataclass(frozen=True)
class IndexedSamples:
    """Samples of an indexed source by position, which is the row in the index, rejects included."""

    source: Source
    index: Index
    conversation: ConversationTokenizer
    tiling: Tiling

    def sample(self, position: int) -> Sample:
        """Read and tokenise one record; its tile plans are computed from the image sizes in the index.

        Raises `DataError` if the record cannot be read or its length has changed since it was indexed.
        """
        record = self.source.record(int(self.index.row[position]))
        (encoded,) = self.conversation.encode([record])
        if isinstance(encoded, DataError):
            raise encoded
        plans = tuple(plan_tiles(size, self.tiling) for size in self.index.sizes(position))
        sample = Sample(record.id, *encoded, record.images, plans)
        if len(plans) != len(record.images) or sample.length != self.index.tokens[position]:
            raise DataError(
                f"record {record.id}: {sample.length} tokens, expected {self.index.tokens[position]} as indexed: "
                "the data has changed; index it again with anyres index"
            )
        return sample


def load(sample: Sample, mode: TilingMode, change: Callable[[int, Pixels], Pixels] | None = None) -> Loaded:
    """Read a sample's images and cut them into tiles; `change` is called with image number and pixels.

    Raises `DataError` if an image is broken or has changed since it was indexed.
    """
    tiles = []
    for number, (image, plan) in enumerate(zip(sample.images, sample.plans, strict=True)):
        augment = None if change is None else partial(change, number)
        tiles.append(tile_image(read_blob(image), plan, image.name, mode, augment))
    return sample, tiles


def collate(pack: Sequence[Loaded], tile: int, image_token_id: int, rejects: Sequence[str] = ()) -> Batch:
    """Concatenate the samples of a pack; an empty pack becomes one unsupervised token."""
    ids: list[NDArray[Any]] = []
    labels: list[NDArray[Any]] = []
    positions: list[NDArray[Any]] = []
    for sample, _ in pack:
        repeats = token_repeats(sample.input_ids, sample.plans, image_token_id)
        ids.append(np.repeat(sample.input_ids, repeats))
        labels.append(np.repeat(sample.labels, repeats))
        positions.append(np.arange(len(ids[-1])))
    no_tiles = np.zeros((0, 3, tile, tile), np.uint8)
    if not pack:
        ids, labels, positions = [np.zeros(1)], [np.full(1, IGNORE_INDEX)], [np.zeros(1)]
    lengths = tuple(map(len, ids))
    input_ids, all_labels = _row(ids), _row(labels)
    supervised, targets = supervision(all_labels, lengths)
    return Batch(
        input_ids=input_ids,
        labels=all_labels,
        position_ids=_row(positions),
        cu_seqlens=torch.from_numpy(np.cumsum([0, *lengths])).to(torch.int32),
        lengths=lengths,
        supervised=supervised,
        targets=targets,
        image_positions=(input_ids[0] == image_token_id).nonzero().squeeze(1),
        tiles=torch.from_numpy(np.concatenate([no_tiles, *(cut for _, images in pack for cut in images)])),
        plans=tuple(plan for sample, _ in pack for plan in sample.plans),
        sample_ids=tuple(sample.id for sample, _ in pack),
        rejects=tuple(rejects),
    )


def _row(parts: Sequence[NDArray[Any]]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))[None]


def _start_worker(worker: int) -> None:
    """Limit OpenCV to one thread per worker (torch does so itself), and ignore SIGTERM unless the trainer sent it."""
    cv2.setNumThreads(1)
    # Launchers send SIGTERM to all processes of a job. The trainer then saves and exits; until then it needs workers.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_exit_on_sigterm_of_trainer, daemon=True).start()


def _exit_on_sigterm_of_trainer() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
