"""Batches hold their packs' samples in order, with any number of workers; unreadable samples are omitted and capped."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from anyres_vlm.config import DataConfig
from anyres_vlm.data.conversation import ConversationTokenizer
from anyres_vlm.data.index.build import build_index
from anyres_vlm.data.index.rows import IndexSettings
from anyres_vlm.data.loader import IndexedSamples, Pack, collate, iter_steps, load
from anyres_vlm.data.sources import open_source
from anyres_vlm.errors import DataError
from anyres_vlm.geometry import Grid, Tiling
from anyres_vlm.schema import IGNORE_INDEX, Batch

TILING = Tiling.from_grid(Grid(2, 2), tile=28)
IMAGE = 4  # id of <image> in the tiny tokenizer
STEPS = [[[0, 1], [2], []], [[4]], [[5, 6], [3]]]


@pytest.fixture
def samples(tmp_path: Path, tiny_tokenizer) -> IndexedSamples:
    """Seven records; those with a number divisible by 3 have no image."""
    records = []
    for number in range(7):
        images = []
        if number % 3:
            images.append(f"{number}.png")
            Image.new("RGB", (20 + 9 * number, 40), (number, 0, 0)).save(tmp_path / images[0])
        question = "<image>\n" * len(images) + "what?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"star {number}"}]
        records.append({"id": str(number), "images": images, "conversations": turns})
    data = tmp_path / "data.json"
    data.write_text(json.dumps(records))
    conversation = ConversationTokenizer("vicuna_v1", tiny_tokenizer)
    settings = IndexSettings(conversation, TILING, max_length=4096)
    built = build_index(data, None, settings, tmp_path / "index.parquet", workers=1, max_bad_fraction=0.0)
    return IndexedSamples(open_source(data), built.index, conversation, TILING)


def load_steps(samples: IndexedSamples, steps, workers=0, **settings) -> list[list[Batch]]:
    shares = [[Pack(0, np.array(pack, np.int64)) for pack in step] for step in steps]
    data = DataConfig(path=Path("data.json"), **{"max_bad_fraction": 0.0, **settings})
    return list(iter_steps(samples, shares, data, seed=0, workers=workers, pin_memory=False))


def test_a_pack_concatenates_its_samples(samples: IndexedSamples) -> None:
    pack = [samples.sample(position) for position in (1, 0, 2)]
    batch = collate([load(sample, "exact") for sample in pack], 28, IMAGE)
    ends = batch.cu_seqlens.tolist()
    assert ends == [0, *np.cumsum([sample.length for sample in pack])]
    for sample, start, end in zip(pack, ends, ends[1:], strict=False):
        ids, labels = batch.input_ids[0, start:end], batch.labels[0, start:end]
        assert batch.position_ids[0, start:end].tolist() == list(range(end - start))
        assert (ids == IMAGE).sum() == sum(plan.total_tokens for plan in sample.plans)
        assert ids[ids != IMAGE].tolist() == sample.input_ids[sample.input_ids != IMAGE].tolist()
        assert labels[labels != IGNORE_INDEX].tolist() == sample.labels[sample.labels != IGNORE_INDEX].tolist()
    assert batch.tiles.shape[0] == pack[0].num_tiles + pack[2].num_tiles
    assert batch.tiles[:, 0].amax() == 2
    assert batch.num_supervised == sum(sample.num_supervised for sample in pack)


def test_a_batch_knows_what_depends_on_its_content(samples: IndexedSamples) -> None:
    """Computed by the loader, so that the model need not wait for the device to read it from there."""
    batch = collate([load(samples.sample(position), "exact") for position in (1, 0, 2, 4)], 28, IMAGE)
    ids, labels, ends = batch.input_ids[0].tolist(), batch.labels[0].tolist(), batch.cu_seqlens.tolist()
    assert list(batch.lengths) == [end - start for start, end in itertools.pairwise(ends)]
    assert batch.image_positions.tolist() == [place for place, word in enumerate(ids) if word == IMAGE]
    expected = [
        (place - 1, labels[place])
        for start, end in itertools.pairwise(ends)
        for place in range(start + 1, end)
        if labels[place] != IGNORE_INDEX
    ]
    assert list(zip(batch.supervised.tolist(), batch.targets.tolist(), strict=True)) == expected
    assert batch.num_supervised == len(expected) > 0
    assert batch.num_pairs == sum(range(1, batch.lengths[0] + 1)) + sum(
        place + 1 for length in batch.lengths[1:] for place in range(length)
    )
    moved = batch.to(torch.device("meta"))
    for name in ("input_ids", "cu_seqlens", "tiles", "supervised", "targets", "image_positions"):
        assert getattr(moved, name).is_meta, name


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_neither_reorder_nor_lose(samples: IndexedSamples, workers: int) -> None:
    steps = load_steps(samples, STEPS, workers)
    assert [[batch.sample_ids for batch in step] for step in steps] == [
        [tuple(map(str, pack)) for pack in step] for step in STEPS
    ]
    idle = steps[0][2]
    assert idle.input_ids.shape == (1, 1)
    assert idle.num_supervised == 0
    inline = [batch for step in load_steps(samples, STEPS) for batch in step]
    for here, there in zip(inline, (batch for step in steps for batch in step), strict=True):
        assert torch.equal(here.input_ids, there.input_ids)
        assert torch.equal(here.labels, there.labels)
        assert torch.equal(here.tiles, there.tiles)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_samples_are_omitted_from_their_pack_only(samples: IndexedSamples, workers: int) -> None:
    path = samples.sample(1).images[0].path
    assert path is not None
    path.write_bytes(path.read_bytes()[:-30])
    (first, *_), _, _ = steps = load_steps(samples, STEPS, workers, max_bad_fraction=0.2)
    assert first.sample_ids == ("0",)
    assert len(first.rejects) == 1
    assert "1.png" in first.rejects[0]
    assert sum(len(batch.sample_ids) for step in steps for batch in step) == 6
    with pytest.raises(DataError, match=r"1 of \d+ records are bad .*1\.png.*more than max_bad_fraction=0\.1"):
        load_steps(samples, STEPS, workers, max_bad_fraction=0.1)


def test_data_that_changed_since_it_was_indexed_is_named(samples: IndexedSamples, tmp_path: Path) -> None:
    path = tmp_path / "1.png"
    Image.new("RGB", (99, 99)).save(path)
    with pytest.raises(DataError, match=r"1\.png.*99x99.*29x40"):
        load(samples.sample(1), "fast")
    data = tmp_path / "data.json"
    data.write_text(data.read_text().replace("star 3", "a star and another star 3"))
    changed = IndexedSamples(open_source(data), samples.index, samples.conversation, TILING)
    with pytest.raises(DataError, match=r"record 3: \d+ tokens, expected \d+ as indexed: the data has changed"):
        changed.sample(3)


def test_workers_exit_only_on_a_signal_from_their_trainer(samples: IndexedSamples) -> None:
    shares = [[Pack(0, np.array(pack, np.int64)) for pack in step] for step in STEPS * 4]
    steps = iter_steps(samples, shares, DataConfig(path=Path("data.json")), seed=0, workers=1, pin_memory=False)
    next(steps)
    (worker,) = multiprocessing.active_children()
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    assert len(list(steps)) == len(shares) - 1
