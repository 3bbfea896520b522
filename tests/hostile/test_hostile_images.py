"""Hostile pictures are refused by one line, or read as Pillow reads them."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from images import (
    TARGETS,
    TILING,
    bad_pictures,
    bomb,
    check_picture,
    encoded,
    good_pictures,
    photo,
    progressive_cut,
)
from PIL import Image, ImageOps
from target import explore
from watch import watched

from anyres_vlm.data.checks import plan_image
from anyres_vlm.data.headers import read_size
from anyres_vlm.data.images import PIXELS_LIMIT, decode_image
from anyres_vlm.data.tiling import tile_image
from anyres_vlm.errors import DataError
from anyres_vlm.schema import ImageRef


@pytest.mark.parametrize("name", good_pictures())
def test_odd_pictures_are_read(tmp_path: Path, name: str) -> None:
    data = good_pictures()[name]
    with watched(tmp_path):
        assert check_picture(data, tmp_path)
    if name.endswith(tuple(f"turned_{number}" for number in range(1, 9))):
        with Image.open(BytesIO(data)) as image:
            wanted = ImageOps.exif_transpose(image).convert("RGB")
        np.testing.assert_array_equal(np.array(decode_image(data, name)), np.array(wanted))


@pytest.mark.parametrize("name", bad_pictures())
def test_bad_pictures_are_refused(tmp_path: Path, name: str) -> None:
    with watched(tmp_path):
        assert not check_picture(bad_pictures()[name], tmp_path)


@pytest.mark.parametrize("name", [name for name in good_pictures() if "turned" not in name])
def test_pictures_cut_short(tmp_path: Path, name: str) -> None:
    data = good_pictures()[name]
    with watched(tmp_path):
        for end in np.linspace(0, len(data) - 1, 25).astype(int):
            check_picture(data[:end], tmp_path)


def test_a_progressive_jpeg_without_scans(tmp_path: Path) -> None:
    with watched(tmp_path):
        read = [check_picture(data, tmp_path) for data in progressive_cut()]
    assert len(read) > 5


def test_long_thin_pictures(tmp_path: Path) -> None:
    for width, height in ((1, 30_000), (65_500, 1), (65_500, 70), (30, 30_000)):
        data = encoded(photo("RGB", width, height), "PNG")
        image = ImageRef("long", data=data)
        with watched(tmp_path):
            assert (read_size(image).width, read_size(image).height) == (width, height)
            assert check_picture(data, tmp_path) == (max(width, height) <= 1000 * min(width, height))


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_pictures(name: str) -> None:
    tally = explore(TARGETS[name], examples=250, fixed=True)
    assert not tally.faults, tally.faults
    assert tally.accepted
    assert tally.rejected
