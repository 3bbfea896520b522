"""Every mode to RGB against arithmetic in numpy, and what is said about files that cannot be decoded."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from anyres_vlm.data.headers import BYTES_LIMIT, PIXELS_LIMIT
from anyres_vlm.data.images import decode_image, decode_pixels, open_image
from anyres_vlm.errors import DataError
from anyres_vlm.geometry import Size

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
    pixels = struct.pack(">I4sI", 0, b"IDAT", zlib.crc32(b"IDAT"))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + pixels


GOOD = encoded(Image.fromarray(COLOUR).resize((200, 100)), "JPEG")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "the file is empty; fetch it again or remove it"),
        (b"no image", "not an image; expected JPEG, PNG, WebP, GIF, BMP or TIFF"),
        (GOOD[: len(GOOD) // 2], r"broken image \(.*truncated.*\); fetch it again or remove it"),
        (encoded(Image.fromarray(COLOUR))[:-200], "broken image; fetch it again or remove it"),
        (huge_png(16000, 10001), rf"16000x10001 pixels; expected .* at most {PIXELS_LIMIT:,} pixels"),
        (huge_png(100000, 100000), "100000x100000 pixels; expected sides up to 65,500"),
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


def test_a_file_of_too_many_bytes(tmp_path: Path) -> None:
    big = tmp_path / "big.jpg"
    with big.open("wb") as stream:
        stream.truncate(BYTES_LIMIT + 1)  # sparse: takes no room
    with pytest.raises(DataError, match=rf"big\.jpg: {BYTES_LIMIT + 1} bytes, at most {BYTES_LIMIT} are read"):
        open_image(big)


# Pixels as the tiles need them: OpenCV against Pillow, and decoding at half the size.

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
