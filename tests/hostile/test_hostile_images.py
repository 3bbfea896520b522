"""Hostile pictures are refused by one line, or read as Pillow reads them."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from images import (
    TARGETS,
    TILING,
    bad_pictures,
    check_picture,
    encoded,
    good_pictures,
    photo,
    progressive_cut,
    turned,
)
from PIL import Image, ImageOps
from target import explore
from watch import watched

from anyres_vlm.config import TilingMode
from anyres_vlm.data.headers import JPEG_PIXELS_LIMIT, PIXELS_LIMIT, plan_image, read_size
from anyres_vlm.data.images import decode_image, open_image
from anyres_vlm.data.tiling import cut_tiles, tile_image
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
        possible = max(width, height) <= 1000 * min(width, height)
        with watched(tmp_path):
            assert check_picture(data, tmp_path) == possible
            if possible:
                assert (read_size(image).width, read_size(image).height) == (width, height)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["png", "png_clear", "png_16", "gif", "webp", "jpeg_progressive", "jpeg_cmyk", "tiff"])
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_the_largest_pictures_take_less_than_a_gibibyte(tmp_path: Path, kind: str, mode: TilingMode) -> None:
    width = 7000
    height = (JPEG_PIXELS_LIMIT if kind.startswith("jpeg") else PIXELS_LIMIT) // width
    file, colours = tmp_path / "large", {"png_clear": "P", "gif": "P", "webp": "RGBA", "png_16": "I;16"}
    picture = Image.new("CMYK" if kind in ("jpeg_cmyk", "tiff") else colours.get(kind, "RGB"), (width, height))
    options: dict[str, Any] = {"exif": turned(6)} if kind != "gif" else {}
    if kind == "png_clear":
        options["transparency"] = 0
    if kind.startswith("jpeg"):
        options |= {"progressive": True, "subsampling": 0}
    picture.save(file, kind.partition("_")[0], **options)
    del picture
    image = ImageRef("large", file)
    with watched(tmp_path):
        plan = plan_image(image, TILING)
        assert tile_image(file.read_bytes(), plan, "large", mode).shape[0] == plan.num_tiles
    with watched(tmp_path):
        cut_tiles(open_image(image), plan)


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_pictures(name: str) -> None:
    tally = explore(TARGETS[name], examples=250, fixed=True)
    assert not tally.faults, tally.faults
    assert tally.accepted
    assert tally.rejected
