"""Four ways through a stage-2 pass over the same samples: ours, stock LlavaNext padded (grouped or not), stock packed.

A way is a function that runs forward and backward over all its batches, leaves the gradients in its model and returns
the loss in nats a supervised token. Batches are made beforehand, as a loader's workers would.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from bench_step_samples import IMAGE_TOKEN_ID, MEAN, SHAPES, STD, TILE, make_ours, make_samples, make_stock, stock_name
from torch import nn

from anyres_vlm.data.loader import Loaded, collate
from anyres_vlm.schema import IGNORE_INDEX, Batch

BATCH, CAPACITY = 8, 2048  # samples of a padded batch; tokens of a pack: 16,384 at the width of a 7B

Pass = Callable[[], float]


class Ways:
    """Both models and the batches of every way."""

    def __init__(self, shape: str, count: int, seed: int, names: Sequence[str]) -> None:
        self.samples = make_samples(count, SHAPES[shape].words, seed)
        self.supervised = sum(sample.num_supervised for sample, _ in self.samples)
        self.ours = make_ours(SHAPES[shape])
        self.passes: dict[str, Pass] = {name: self._our_pass() for name in names if name == OURS}
        if self.passes.keys() != set(names):
            self.stock = make_stock(SHAPES[shape], self.ours)
            self.passes |= {name: self._stock_pass(STOCK[name](self.samples)) for name in names if name != OURS}

    def model(self, name: str) -> nn.Module:
        """The model that a way leaves its gradients in."""
        return self.ours if name == OURS else self.stock

    def gradients(self, name: str) -> dict[str, torch.Tensor]:
        """The gradients that a way left, under stock's names."""
        rename = stock_name if name == OURS else str
        parameters = self.model(name).named_parameters()
        return {rename(key): value.grad.clone() for key, value in parameters if value.grad is not None}

    def _our_pass(self) -> Pass:
        batches = [collate(pack, TILE, IMAGE_TOKEN_ID) for pack in first_fit(self.samples)]

        def run() -> float:
            self.ours.zero_grad()
            return sum(_step(self.ours(batch) / self.supervised) for batch in batches)

        return run

    def _stock_pass(self, batches: list[dict[str, Any]]) -> Pass:
        def run() -> float:
            self.stock.zero_grad()
            return sum(_step(self._stock_loss(batch)) for batch in batches)

        return run

    def _stock_loss(self, batch: dict[str, Any]) -> torch.Tensor:
        # With a cache, stock takes no notice of positions that start anew: a pack would be one document.
        loss: torch.Tensor = self.stock(**batch, use_cache=False, num_items_in_batch=self.supervised).loss
        return loss


def _step(loss: torch.Tensor) -> float:
    loss.backward()
    return loss.item()


def first_fit(samples: Sequence[Loaded]) -> list[list[Loaded]]:
    """Packs of at most `CAPACITY` tokens, the longest samples first."""
    packs: list[list[Loaded]] = []
    for sample in sorted(samples, key=_length, reverse=True):
        for pack in packs:
            if sum(map(_length, pack)) + _length(sample) <= CAPACITY:
                pack.append(sample)
                break
        else:
            packs.append([sample])
    return packs


def _length(sample: Loaded) -> int:
    return sample[0].length


def length_grouped(samples: Sequence[Loaded]) -> list[dict[str, Any]]:
    """Padded batches of neighbours in length: over the whole pass, where a sampler groups within windows."""
    return _padded(sorted(samples, key=_length, reverse=True))


def randomly(samples: Sequence[Loaded]) -> list[dict[str, Any]]:
    """Padded batches in random order."""
    return _padded(random.Random(0).sample(list(samples), len(samples)))


def _padded(samples: Sequence[Loaded]) -> list[dict[str, Any]]:
    return [_stock_inputs(samples[first : first + BATCH]) for first in range(0, len(samples), BATCH)]


def _stock_inputs(group: Sequence[Loaded]) -> dict[str, Any]:
    rows = [collate([sample], TILE, IMAGE_TOKEN_ID) for sample in group]
    width = max(row.input_ids.shape[1] for row in rows)
    padded = {"input_ids": torch.zeros(len(rows), width, dtype=torch.long)}
    padded["attention_mask"] = padded["input_ids"].clone()
    padded["labels"] = torch.full_like(padded["input_ids"], IGNORE_INDEX)
    for number, row in enumerate(rows):
        length = row.input_ids.shape[1]
        padded["input_ids"][number, :length] = row.input_ids[0]
        padded["attention_mask"][number, :length] = 1
        padded["labels"][number, :length] = row.labels[0]
    return padded | _stock_images(rows)


def packed_by_positions(samples: Sequence[Loaded]) -> list[dict[str, Any]]:
    """Our packs as stock understands them: positions that start anew, no label where nothing precedes it."""
    batches = []
    for pack in first_fit(samples):
        row = collate(pack, TILE, IMAGE_TOKEN_ID)
        labels = row.labels.clone()
        labels[0, row.cu_seqlens[:-1].long()] = IGNORE_INDEX
        inputs = {"input_ids": row.input_ids, "position_ids": row.position_ids, "labels": labels}
        batches.append(inputs | _stock_images([row]))
    return batches


def _stock_images(rows: Sequence[Batch]) -> dict[str, Any]:
    """Pixels as the processor gives them: normalised, a row of tiles an image, filled up to the longest."""
    plans = [plan for row in rows for plan in row.plans]
    if not plans:
        return {}
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    tiles = (torch.cat([row.tiles for row in rows]) / 255 - mean) / std
    pixels = torch.zeros(len(plans), max(plan.num_tiles for plan in plans), 3, TILE, TILE)
    for number, image in enumerate(torch.split(tiles, [plan.num_tiles for plan in plans])):
        pixels[number, : len(image)] = image
    sizes = torch.tensor([[plan.image.height, plan.image.width] for plan in plans])
    return {"pixel_values": pixels, "image_sizes": sizes}


OURS = "anyres"
STOCK = {
    "stock, length-grouped": length_grouped,
    "stock, random": randomly,
    "stock, packed": packed_by_positions,
}
