"""Pixels against Pillow's decoder, for every kind of JPEG, and when half the size is taken."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import ExifTags, Image

from anyres_vlm.data.images import decode_image
from anyres_vlm.data.pixels import decode_pixels
from anyres_vlm.errors import DataError
from anyres_vlm.geometry import Size

NOISE = np.random.default_rng(3).integers(0, 256, (61, 83, 3), dtype=np.uint8)
SOFT = Image.fromarray(NOISE[:8, :8]).resize((640, 480), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, turn: int = 1, **options: object) -> bytes:
    stream, exif = BytesIO(), Image.Exif()
    exif[ExifTags.Base.Orientation] = turn
    image.save(stream, "JPEG", exif=exif, **options)
    return stream.getvalue()


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_every_kind_of_jpeg(subsampling: str, progressive: bool, mode: str) -> None:
    options = {} if mode == "CMYK" else {"subsampling": subsampling}
    data = jpeg(Image.fromarray(NOISE).convert(mode), progressive=progressive, quality=90, **options)
    pixels, size = decode_pixels(data, "a")
    assert np.array_equal(pixels, np.asarray(decode_image(data, "a")))
    assert size == Size(height=61, width=83)


def test_rgb_inside_and_bytes_behind_the_end() -> None:
    data = jpeg(Image.fromarray(NOISE), keep_rgb=True, quality=95)
    for changed in (data, data + b"trailer", data + b"\0\0"):
        assert np.array_equal(decode_pixels(changed, "a")[0], np.asarray(decode_image(data, "a")))


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("fineness", [1.0, 5.0])
def test_orientation(turn: int, fineness: float) -> None:
    data = jpeg(SOFT, turn)
    whole = np.asarray(decode_image(data, "a"))
    pixels, size = decode_pixels(data, "a", fineness)
    assert (size.height, size.width) == whole.shape[:2]
    if fineness == 1:
        assert np.array_equal(pixels, whole)
    else:
        assert pixels.shape == (size.height // 2, size.width // 2, 3)
        halved = whole.reshape(size.height // 2, 2, size.width // 2, 2, 3).mean((1, 3))
        assert np.abs(pixels - halved).mean() < 1


@pytest.mark.parametrize(
    ("image", "turn", "fineness", "halved"),
    [
        (SOFT, 1, 2.7, False),
        (SOFT, 1, 2.9, True),
        (Image.fromarray(NOISE), 1, 4.7, False),
        (Image.fromarray(NOISE), 1, 4.9, True),
        (Image.fromarray(NOISE), 6, 4.9, False),  # odd sides: the half pixel would lie at the start
        (SOFT.convert("L"), 6, 4.9, True),
        (SOFT.convert("CMYK"), 1, 4.9, False),
    ],
)
def test_half_the_size_where_it_is_enough(image: Image.Image, turn: int, fineness: float, halved: bool) -> None:
    pixels, size = decode_pixels(jpeg(image, turn, quality=90), "a", fineness)
    factor = 2 if halved else 1
    assert pixels.shape == (-(-size.height // factor), -(-size.width // factor), 3)


@pytest.mark.parametrize("kept", [0.3, 0.9, 0.99])
def test_a_truncated_file_is_refused(kept: float) -> None:
    data = jpeg(SOFT)
    for fineness in (1.0, 5.0):
        with pytest.raises(DataError, match=r"^b\.jpg: broken image \(.*truncated"):
            decode_pixels(data[: int(kept * len(data))], "b.jpg", fineness)


def test_a_luminance_table_of_any_number() -> None:
    """A JPEG may call its only quantisation table 1."""
    data = jpeg(SOFT.convert("L"))
    renumbered = bytearray(data)
    renumbered[data.index(b"\xff\xdb") + 4] = 1
    renumbered[data.index(b"\xff\xc0") + 12] = 1
    for fineness in (1.0, 5.0):
        assert np.array_equal(decode_pixels(bytes(renumbered), "a", fineness)[0], decode_pixels(data, "a", fineness)[0])
