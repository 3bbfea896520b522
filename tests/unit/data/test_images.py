"""Every mode to RGB against arithmetic in numpy, and what is said about files that cannot be decoded."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from anyres_vlm.data.images import BYTES_LIMIT, PIXELS_LIMIT, decode_image, open_image
from anyres_vlm.errors import DataError

RANDOM = np.random.default_rng(0)
GREY = RANDOM.integers(0, 256, (20, 30), dtype=np.uint8)
COLOUR = RANDOM.integers(0, 256, (20, 30, 3), dtype=np.uint8)
ALPHA = RANDOM.integers(0, 256, (20, 30, 1), dtype=np.uint8)


def encoded(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    stream = BytesIO()
    image.save(stream, image_format, **options)
    return stream.getvalue()


def decoded(data: bytes) -> np.ndarray:
    image = decode_image(data, "a.png")
    assert image.mode == "RGB"
    return np.asarray(image).astype(float)


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return (colour.astype(float) * alpha + 255.0 * (255 - alpha)) / 255


def test_alpha_lies_over_white() -> None:
    rgba = np.concatenate([COLOUR, ALPHA], axis=2)
    assert np.abs(decoded(encoded(Image.fromarray(rgba))) - over_white(COLOUR, ALPHA)).max() <= 1
    grey_alpha = np.concatenate([GREY[..., None], ALPHA], axis=2)
    assert np.abs(decoded(encoded(Image.fromarray(grey_alpha, "LA"))) - over_white(GREY[..., None], ALPHA)).max() <= 1


@pytest.mark.parametrize(("mode", "key"), [("RGB", (1, 2, 3)), ("L", 7), ("P", 7), ("1", 0)])
def test_a_transparent_colour_is_white(mode: str, key: object) -> None:
    """Not in the alpha channel but as one colour or palette entry that the file calls transparent."""
    image = Image.new(mode, (4, 2), key)
    other = {"RGB": (200, 0, 0), "L": 90, "P": 9, "1": 1}[mode]
    image.paste(other, (0, 0, 2, 2))
    if mode == "P":
        image.putpalette([value for index in range(256) for value in (index, 0, 255 - index)])
    found = decoded(encoded(image, transparency=key))
    assert (found[:, 2:] == 255).all()
    assert (found[:, :2] == {"RGB": (200, 0, 0), "L": 90, "P": (9, 0, 246), "1": 255}[mode]).all()


@pytest.mark.parametrize(("image_format", "order"), [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2")])
def test_sixteen_bits_keep_their_range(image_format: str, order: str) -> None:
    levels = np.arange(65536, dtype=order).reshape(256, 256)
    found = decoded(encoded(Image.fromarray(levels), image_format))
    assert np.array_equal(found, np.repeat(np.floor(levels / 257 + 0.5)[..., None], 3, axis=2))


def test_cmyk_and_palette_and_bits() -> None:
    ink = RANDOM.integers(0, 256, (20, 30, 4), dtype=np.uint8)
    expected = 255 * (1 - ink[..., :3] / 255) * (1 - ink[..., 3:] / 255)
    assert np.abs(decoded(encoded(Image.fromarray(ink, "CMYK"), "TIFF")) - expected).max() <= 2
    smooth = Image.fromarray(ink, "CMYK").resize((2, 2)).resize((64, 64), Image.Resampling.BILINEAR)
    four = np.asarray(smooth) / 255.0
    expected = 255 * (1 - four[..., :3]) * (1 - four[..., 3:])
    assert np.abs(decoded(encoded(smooth, "JPEG", quality=100)) - expected).max() <= 8  # lossy, but never inverted
    palette = RANDOM.integers(0, 256, (256, 3), dtype=np.uint8)
    image = Image.fromarray(GREY, "P")
    image.putpalette(palette.tobytes())
    for image_format in ("PNG", "GIF", "BMP"):
        assert np.array_equal(decoded(encoded(image, image_format)), palette[GREY])
    bits = GREY > 127
    assert np.array_equal(decoded(encoded(Image.fromarray(bits)))[..., 0], bits * 255)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_every_orientation(image_format: str, turn: int) -> None:
    image = Image.fromarray(COLOUR).resize((16, 8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turn
    data = encoded(image, image_format, exif=exif)
    with Image.open(BytesIO(data)) as stored:
        expected = ImageOps.exif_transpose(stored).convert("RGB")
    assert decode_image(data, "a").size == ((8, 16) if turn >= 5 else (16, 8))
    assert np.array_equal(decoded(data), np.asarray(expected))


def test_the_first_frame_counts() -> None:
    frames = [Image.new("RGB", (5, 5), colour) for colour in ("red", "lime", "blue")]
    for image_format in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if image_format == "WEBP" else {}
        data = encoded(frames[0], image_format, save_all=True, append_images=frames[1:], **options)
        assert (decoded(data) == (255, 0, 0)).all()


def huge_png(width: int, height: int) -> bytes:
    """A header and the start of the pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = struct.pack(">I4s", 2**20, b"IDAT")
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + pixels


GOOD = encoded(Image.fromarray(COLOUR).resize((200, 100)), "JPEG")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not an image in one of the formats JPEG, PNG"),
        (b"no image", "not an image in one of the formats JPEG, PNG"),
        (GOOD[: len(GOOD) // 2], r"broken image \(.*truncated.*\): replace or remove it"),
        (encoded(Image.fromarray(COLOUR))[:-200], r"broken image \("),
        (huge_png(16000, 10001), rf"16000x10001 is too large to decode, at most {PIXELS_LIMIT} pixels"),
        (huge_png(100000, 100000), "too large to decode"),
        (encoded(Image.fromarray(GREY.astype(np.int32)), "TIFF"), r"32-bit grey \(I\) has no defined white"),
        (encoded(Image.fromarray(GREY.astype(np.float32)), "TIFF"), r"32-bit grey \(F\) has no defined white"),
    ],
    ids="empty text jpeg-cut png-cut too-many-pixels absurd grey-int grey-float".split(),
)
def test_what_cannot_be_decoded_is_named(data: bytes, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        decode_image(data, "folder/a.jpg")
    assert str(caught.value).startswith("folder/a.jpg: ")
    assert "\n" not in str(caught.value)


def test_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.png: no such file; check the path"):
        open_image(tmp_path / "none.png")
    with pytest.raises(DataError, match=r"a folder, not a file"):
        open_image(tmp_path)
    big = tmp_path / "big.jpg"
    with big.open("wb") as stream:
        stream.truncate(BYTES_LIMIT + 1)  # sparse: takes no room
    with pytest.raises(DataError, match=rf"big\.jpg: {BYTES_LIMIT + 1} bytes, at most {BYTES_LIMIT} are read"):
        open_image(big)
    (tmp_path / "a.jpg").write_bytes(GOOD)
    assert open_image(tmp_path / "a.jpg").size == (200, 100)
