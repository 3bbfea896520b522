"""Batches hold their samples in order, on any number of ranks and workers, and name a bad file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from anyres_vlm.data.dataset import tokenise
from anyres_vlm.data.images import open_image
from anyres_vlm.data.loader import collate, iter_steps
from anyres_vlm.errors import DataError
from anyres_vlm.geometry import Grid, Tiling
from anyres_vlm.schema import IGNORE_INDEX, ImageRef, Record, Sample, Turn

TILING = Tiling.from_grid(Grid(2, 2), tile=28)
IMAGE = 4  # id of <image> in the tiny tokenizer


@pytest.fixture
def samples(tmp_path: Path, tiny_tokenizer) -> list[Sample]:
    records = []
    for number in range(7):
        images = []
        if number % 3:
            images.append(tmp_path / f"{number}.png")
            Image.new("RGB", (20 + 9 * number, 40), (number, 0, 0)).save(images[0])
        turns = (Turn("user", "<image>\n" * len(images) + "what?"), Turn("assistant", f"star {number}"))
        records.append(Record(str(number), tuple(ImageRef(str(path), path) for path in images), turns))
    return tokenise(records, "vicuna_v1", tiny_tokenizer, TILING, 4096, 0.0)


def load(samples: list[Sample], steps, first_step=0, rank=0, world_size=1, workers=0):
    return list(
        iter_steps(
            samples,
            steps,
            first_step,
            tile=28,
            image_token_id=IMAGE,
            rank=rank,
            world_size=world_size,
            workers=workers,
        )
    )


def test_a_pack_is_its_samples_one_behind_another(samples: list[Sample]) -> None:
    batch = collate([samples[1], samples[0], samples[2]], 28, IMAGE)
    ends = batch.cu_seqlens.tolist()
    assert ends == [0, *np.cumsum([samples[1].length, samples[0].length, samples[2].length])]
    for sample, start, end in zip((samples[1], samples[0], samples[2]), ends, ends[1:], strict=False):
        ids, labels = batch.input_ids[0, start:end], batch.labels[0, start:end]
        assert batch.position_ids[0, start:end].tolist() == list(range(end - start))
        assert (ids == IMAGE).sum() == sum(plan.total_tokens for plan in sample.plans)
        assert ids[ids != IMAGE].tolist() == sample.input_ids[sample.input_ids != IMAGE].tolist()
        assert labels[labels != IGNORE_INDEX].tolist() == sample.labels[sample.labels != IGNORE_INDEX].tolist()
    assert batch.tiles.shape[0] == samples[1].num_tiles + samples[2].num_tiles
    assert batch.tiles[:, 0].amax() == 2
    assert batch.num_supervised == sum(s.num_supervised for s in (samples[0], samples[1], samples[2]))


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_share_the_packs_and_run_as_many_passes(samples: list[Sample], workers: int) -> None:
    steps = [[[0, 1], [2], [3]], [[4]], [[5, 6], [1]]]
    alone = load(samples, steps, workers=workers)
    assert [[batch.sample_ids for batch in step] for step in alone] == [
        [tuple(str(n) for n in pack) for pack in step] for step in steps
    ]
    ranks = [load(samples, steps, rank=rank, world_size=2, workers=workers) for rank in range(2)]
    for position, packs in enumerate(steps):
        assert len(ranks[0][position]) == len(ranks[1][position]) == -(-len(packs) // 2)
        shown = [batch.sample_ids for rank in ranks for batch in rank[position]]
        assert sorted(ids for ids in shown if ids) == sorted(tuple(map(str, pack)) for pack in packs)
        assert all(batch.num_supervised == 0 for rank in ranks for batch in rank[position] if not batch.sample_ids)
    resumed = load(samples, steps, first_step=1, workers=workers)
    for after, before in zip(resumed, alone[1:], strict=True):
        assert all(torch.equal(a.tiles, b.tiles) for a, b in zip(after, before, strict=True))
        assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_went_bad_is_named(samples: list[Sample], workers: int) -> None:
    path = samples[1].images[0].path
    content = path.read_bytes()
    path.write_bytes(content[:-30])
    with pytest.raises(DataError, match=r"1\.png"):
        load(samples, [[[0], [1]]], workers=workers)
    Image.new("RGB", (99, 99)).save(path)
    with pytest.raises(DataError, match=r"size is 99x99, planned were 29x40"):
        load(samples, [[[0], [1]]], workers=workers)


def test_over_long_and_missing_are_left_out_whole(tmp_path: Path, tiny_tokenizer) -> None:
    turns = (Turn("user", "what?"), Turn("assistant", "star " * 50))
    with pytest.raises(DataError, match=r"record a: \d+ tokens exceed max_length=20: .* \d+ of them, 0 visual"):
        tokenise([Record("a", (), turns)], "vicuna_v1", tiny_tokenizer, TILING, 20, 0.0)
    missing = Record(
        "b", (ImageRef("none.png", tmp_path / "none.png"),), (Turn("user", "<image>"), Turn("assistant", "star"))
    )
    with pytest.raises(DataError, match=r"none\.png"):
        tokenise([missing], "vicuna_v1", tiny_tokenizer, TILING, 4096, 0.0)


def test_pictures_come_upright_and_in_rgb(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 2), "red")
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg").size == (2, 4)
    Image.new("LA", (3, 3)).save(tmp_path / "b.png")
    assert open_image(tmp_path / "b.png").mode == "RGB"
    (tmp_path / "c.png").write_text("no image")
    for name, words in (("c.png", "not an image"), ("d.png", "no such file")):
        with pytest.raises(DataError, match=rf"{name}: {words}"):
            open_image(tmp_path / name)
