"""Test sizes from headers against decoded images, and the refusal of files that are broken or not images."""

from __future__ import annotations

import itertools
import random
import re
import struct
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from PIL import ExifTags, Image, ImageOps

from anyres_vlm.data.headers import ordinary_jpeg_size, read_size
from anyres_vlm.data.images import decode_pixels, open_image
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.geometry import Size
from anyres_vlm.schema import ImageRef

WITH_EXIF = ("JPEG", "PNG", "WEBP", "TIFF")
FORMATS = (*WITH_EXIF, "GIF", "BMP")
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def picture(width: int = 30, height: int = 20) -> Image.Image:
    image = Image.radial_gradient("L").resize((width, height))
    return Image.merge("RGB", (image, image, image))


def encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format=image_format, **options)
    return buffer.getvalue()


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = value
    return exif


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def as_size(image: Image.Image) -> Size:
    return Size(height=image.height, width=image.width)


@pytest.mark.parametrize(("image_format", "value"), [*itertools.product(WITH_EXIF, range(10))])
def test_orientation_as_pillow_applies_it(tmp_path: Path, image_format: str, value: int) -> None:
    file = tmp_path / "image"
    file.write_bytes(encoded(picture(), image_format, exif=orientation(value)))
    with Image.open(file) as image:
        shown = ImageOps.exif_transpose(image)
    assert read_size(file) == as_size(shown)
    assert (as_size(shown) == Size(height=30, width=20)) == (value in (5, 6, 7, 8))


@pytest.mark.parametrize("place", ["before the pixels", "after the pixels"])
@pytest.mark.parametrize("kind", ["eXIf", "XMP"])
def test_orientation_anywhere_in_a_png(tmp_path: Path, kind: str, place: str) -> None:
    exif = chunk(b"eXIf", orientation(6).tobytes().removeprefix(b"Exif\0\0"))
    xmp = chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<rdf:Description tiff:Orientation="6"/>')
    plain = encoded(picture(), "PNG")
    at = plain.index(b"IDAT") - 4 if place == "before the pixels" else plain.index(b"IEND") - 4
    file = tmp_path / "turned.png"
    file.write_bytes(plain[:at] + (exif if kind == "eXIf" else xmp) + plain[at:])
    with Image.open(file) as image:
        assert read_size(file) == as_size(ImageOps.exif_transpose(image)) == Size(height=30, width=20)


def test_no_pixel_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {name: tmp_path / name for name in WITH_EXIF}
    for name, file in files.items():
        file.write_bytes(encoded(picture(), name, exif=orientation(6)))

    def decode(image: Image.Image) -> None:
        raise AssertionError(f"{image.format} was decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    for file in files.values():
        assert read_size(file) == Size(height=30, width=20)


def huge(image_format: str, width: int, height: int) -> bytes:
    """A file with so many pixels in its header alone."""
    small = bytearray(encoded(picture(), image_format))
    if image_format == "PNG":
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        return SIGNATURE + header + bytes(small[len(SIGNATURE) + len(header) :])
    where, form = {"JPEG": (small.find(b"\xff\xc0") + 5, ">HH"), "GIF": (6, "<HH"), "BMP": (18, "<ii")}[image_format]
    struct.pack_into(form, small, where, *((height, width) if image_format == "JPEG" else (width, height)))
    if image_format == "GIF":
        struct.pack_into("<HH", small, small.index(b",") + 5, width, height)
    return bytes(small)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "GIF", "BMP"])
@pytest.mark.parametrize(("width", "height"), [(65_500, 65_500), (65_500, 60), (10_000, 8_501), (8_500, 6_000)])
def test_impossible_sizes_are_refused_by_headers_and_decoders_alike(
    tmp_path: Path, image_format: str, width: int, height: int
) -> None:
    """Too many pixels for any format, too elongated, too many for a JPEG, and too many for all but a JPEG."""
    file = tmp_path / "huge"
    file.write_bytes(huge(image_format, width, height))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's about decompression bombs
        if image_format == "JPEG" and width * height <= 85_000_000 and width <= 1000 * height:
            assert read_size(file) == Size(height=height, width=width)
            return
        with pytest.raises(DataError, match=rf"huge: {width}x{height} pixels; expected") as caught:
            read_size(file)
        assert caught.value.kind == "absurd_image"
        assert refusal(open_image, file) == str(caught.value)


@pytest.mark.parametrize(("image_format", "num_pixels"), [("JPEG", 85_000_000), ("BMP", 50_000_000)])
def test_the_largest_sizes_are_accepted(tmp_path: Path, image_format: str, num_pixels: int) -> None:
    file = tmp_path / "large"
    file.write_bytes(huge(image_format, 10_000, num_pixels // 10_000))
    assert read_size(file) == Size(height=num_pixels // 10_000, width=10_000)


def refusal(read: Callable[[Path], object], file: Path) -> str:
    with pytest.raises(DataError) as caught:
        read(file)
    return str(caught.value)


@pytest.mark.parametrize(
    ("width", "height", "said"),
    [
        (-127, 20, "a width of -127 pixels"),
        (-30, -20, "a width of -30 pixels"),
        (2**31 - 1, 20, "2147483647x20 pixels; expected"),
        (30, -(2**31), "30x2147483648 pixels; expected"),
    ],
)
def test_a_bitmap_with_an_impossible_side(tmp_path: Path, width: int, height: int, said: str) -> None:
    content = bytearray(encoded(picture(), "BMP"))
    struct.pack_into("<ii", content, 18, width, height)
    file = tmp_path / "odd.bmp"
    file.write_bytes(content)
    assert refusal(read_size, file).startswith(f"{file}: {said}")
    assert refusal(open_image, file) == refusal(read_size, file)
    with pytest.raises(DataError) as caught:
        read_size(file)
    assert caught.value.kind == "absurd_image"


def test_a_bitmap_from_the_top_down(tmp_path: Path) -> None:
    content = bytearray(encoded(picture(), "BMP"))
    struct.pack_into("<i", content, 22, -20)
    file = tmp_path / "top_down.bmp"
    file.write_bytes(content)
    assert read_size(file) == Size(height=20, width=30)
    assert open_image(file).tobytes() == picture().transpose(Image.Transpose.FLIP_TOP_BOTTOM).tobytes()


def deflated(num_bytes: int) -> bytes:
    return zlib.compress(bytes(num_bytes), 9)


XMP = b"XML:com.adobe.xmp\0"
TURNED = b'<rdf:Description tiff:Orientation="6"/>'
LARGE_CHUNKS = {
    "one text": [chunk(b"tEXt", b"Comment\0" + bytes(2**21))],
    "many texts": [chunk(b"tEXt", b"Comment\0" + bytes(2**20))] * 66,
    "compressed text": [chunk(b"zTXt", b"Comment\0\0" + deflated(2**21))],
    "unknown compression": [chunk(b"zTXt", b"Comment\0\7" + deflated(9))],
    "international text": [chunk(b"iTXt", b"Comment\0\1\0\0\0" + deflated(2**21))],
    "XMP": [chunk(b"iTXt", XMP + b"\1\0\0\0" + zlib.compress(TURNED + bytes(2**21)))],
    "EXIF as text": [chunk(b"zTXt", b"Raw profile type exif\0\0" + deflated(2**21))],
    "profile": [chunk(b"iCCP", b"sRGB\0\0" + deflated(2**22))],
    "bomb": [chunk(b"iTXt", XMP + b"\1\0\0\0" + deflated(2**29))],
}


@pytest.mark.parametrize("place", ["IDAT", "IEND"])
@pytest.mark.parametrize("kind", LARGE_CHUNKS)
def test_large_texts_and_profiles_of_a_png_are_skipped(tmp_path: Path, kind: str, place: str) -> None:
    plain = encoded(picture(), "PNG")
    at = plain.index(place.encode()) - 4
    file = tmp_path / "texts.png"
    file.write_bytes(plain[:at] + b"".join(LARGE_CHUNKS[kind]) + plain[at:])
    tracemalloc.start()
    assert read_size(file) == Size(height=20, width=30)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    assert open_image(file).tobytes() == picture().tobytes()


@pytest.mark.parametrize("compressed", [False, True])
def test_orientation_beside_large_texts(tmp_path: Path, compressed: bool) -> None:
    text = bytes(2**19) + TURNED
    xmp = chunk(b"iTXt", XMP + (b"\1\0\0\0" + zlib.compress(text) if compressed else b"\0\0\0\0" + text))
    plain = encoded(picture(), "PNG")
    at = plain.index(b"IDAT") - 4
    file = tmp_path / "turned.png"
    file.write_bytes(plain[:at] + LARGE_CHUNKS["profile"][0] + xmp + LARGE_CHUNKS["one text"][0] + plain[at:])
    assert read_size(file) == as_size(open_image(file)) == Size(height=30, width=20)


def directory_bomb(num_bytes: int) -> bytes:
    """A TIFF directory of 60,000 values that all refer to the same megabytes."""
    entries = b"".join(struct.pack("<HHII", 40_000 % 65_536 + tag % 20_000, 7, num_bytes, 8) for tag in range(60_000))
    body = bytes(num_bytes)
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + struct.pack("<H", 60_000) + entries + bytes(4)


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "TIFF"])
def test_overlapping_values_of_a_directory_do_not_fill_the_memory(tmp_path: Path, image_format: str) -> None:
    bomb = directory_bomb(2**20)  # 59 GiB
    file = tmp_path / "bomb"
    if image_format == "TIFF":
        file.write_bytes(bomb)
        assert "broken image" in refusal(read_size, file)
        return
    file.write_bytes(encoded(picture(), image_format, exif=bomb))
    assert read_size(file) == as_size(open_image(file)) == Size(height=20, width=30)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
def test_broken_exif_does_not_make_an_image_broken(tmp_path: Path, image_format: str, exif: bytes) -> None:
    file = tmp_path / "odd"
    file.write_bytes(encoded(picture(), image_format, exif=exif))
    assert read_size(file) == as_size(open_image(file)) == Size(height=20, width=30)


def test_pillow_logs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "samples.tiff"
    file.write_bytes(encoded(picture(), "TIFF", tiffinfo={277: 5000}))
    content = bytearray(file.read_bytes())
    at = content.index(struct.pack("<HHI", 277, 3, 1))
    struct.pack_into("<H", content, at + 8, 5000)
    file.write_bytes(content)
    assert "broken image" in refusal(read_size, file)
    assert caplog.text == ""


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(
        [("JPEG", mode) for mode in ("L", "RGB", "CMYK", "YCbCr")]
        + [("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")]
        + [("WEBP", "RGB"), ("WEBP", "RGBA"), ("GIF", "P"), ("GIF", "L"), ("BMP", "RGB"), ("BMP", "P"), ("MPO", "RGB")]
        + [("TIFF", mode) for mode in ("1", "L", "LA", "RGB", "RGBA", "CMYK", "I;16", "P")]
    ),
    st.integers(1, 60),
    st.integers(1, 60),
    st.integers(0, 9),
    st.booleans(),
    st.integers(0, 99),
)
def test_the_header_has_the_size_that_is_decoded(
    kind: tuple[str, str], width: int, height: int, turn: int, animated: bool, cut: int
) -> None:
    image_format, mode = kind
    image = picture(width, height).convert("L").convert(mode) if mode != "I;16" else Image.new(mode, (width, height))
    options: dict[str, Any] = {"exif": orientation(turn)} if turn and image_format in (*WITH_EXIF, "MPO") else {}
    if image_format == "MPO" or (animated and image_format in ("GIF", "WEBP", "PNG", "TIFF") and mode != "I;16"):
        options |= {"save_all": True, "append_images": [ImageOps.mirror(image)]}
    if mode == "P" and image_format in ("PNG", "GIF"):
        options["transparency"] = 3
    data = encoded(image, image_format, **options)
    reference = ImageRef("whole", data=data)
    shown = open_image(reference)
    assert read_size(reference) == as_size(shown) == decode_pixels(data, "whole")[1]
    with Image.open(BytesIO(data)) as opened:
        assert as_size(shown) == as_size(ImageOps.exif_transpose(opened))
    part = ImageRef("part", data=data[: len(data) * cut // 100])
    measured, decoded = outcome(read_size, part), outcome(lambda image: as_size(open_image(image)), part)
    assert decoded == measured or (isinstance(measured, Size) and "broken image (" in str(decoded))


def outcome(read: Callable[[ImageRef], Size], image: ImageRef) -> Size | str:
    """Return the size or the text of the refusal."""
    try:
        return read(image)
    except DataError as error:
        return str(error)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty; fetch it again or remove it"),
        (b"<html>404 Not Found</html>", "not an image; expected JPEG, PNG, WebP, GIF, BMP or TIFF"),
        (b"\xff\xd8\xff", "broken image"),
        (SIGNATURE, "broken image"),
        (
            SIGNATURE + chunk(b"IHDR", struct.pack(">IIBBBBB", 0, 5, 8, 2, 0, 0, 0)) + chunk(b"IEND", b""),
            "broken image",
        ),
        (b"RIFF\x04\0\0\0WAVE", "broken image"),
        (b"BM is not always a bitmap", "broken image"),
        (b"II is not always a TIFF", "broken image"),
    ],
)
def test_broken_file_is_named_with_a_remedy(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "photo.jpg"
    file.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_size(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("image_format", FORMATS)
def test_damaged_files_give_a_size_or_a_data_error(tmp_path: Path, image_format: str) -> None:
    """Cut and flipped bytes: whatever Pillow's readers raise, the caller sees one kind of error."""
    rng = random.Random(0)
    options = {"exif": orientation(6)} if image_format in WITH_EXIF else {}
    whole = encoded(picture(), image_format, **options)
    file = tmp_path / "damaged"
    refused = 0
    for trial in range(150):
        damaged = bytearray(whole[: rng.randint(1, len(whole))] if trial % 3 == 0 else whole)
        for _ in range(trial % 7):
            damaged[rng.randrange(min(len(damaged), 150))] = rng.randrange(256)
        file.write_bytes(damaged)
        try:
            read_size(file)
        except DataError:
            refused += 1
    assert 0 < refused < 150


@pytest.mark.parametrize(("cut", "accepted"), [(16, False), (12, True), (8, True), (1, True)])
def test_a_png_is_refused_if_pixels_are_missing(tmp_path: Path, cut: int, accepted: bool) -> None:
    """The last 12 bytes are the end marker, which no pixel needs."""
    file = tmp_path / "cut.png"
    file.write_bytes(encoded(picture(), "PNG")[:-cut])
    if accepted:
        assert read_size(file) == as_size(open_image(file))
    else:
        assert re.search(r"cut\.png: broken image", refusal(read_size, file))
        assert refusal(open_image, file) == refusal(read_size, file)


# The fast reader of JPEG headers against Pillow's, on whole, mutated and truncated files.


def jpeg(rng: random.Random, orientation: int = 0, **options: Any) -> bytes:
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
        exif[0x010F], exif[0x0110] = "Maker", "Camera " * rng.randint(1, 9)
        exif[0x8769] = {0x9003: "2020:01:01 00:00:00"}
        options["exif"] = exif
    buffer = BytesIO()
    image = Image.new(rng.choice(["RGB", "L", "CMYK"]), (rng.randint(1, 90), rng.randint(1, 90)))
    image.save(buffer, format="JPEG", progressive=rng.random() < 0.3, **options)
    return buffer.getvalue()


def shown(content: bytes) -> Size | None:
    """What Pillow shows, from the header; None where it refuses the file."""
    try:
        with Image.open(BytesIO(content), formats=["JPEG", "MPO"]) as image:
            size = Size(height=image.height, width=image.width)
            turned = image.getexif().get(0x0112) in (5, 6, 7, 8)
    except (OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, struct.error):
        return None
    return Size(height=size.width, width=size.height) if turned else size


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("options", [{}, {"comment": b"hi"}, {"icc_profile": b"x" * 300}, {"dpi": (72, 72)}])
def test_ordinary_files_are_answered_as_pillow_shows_them(orientation: int, options: dict[str, Any]) -> None:
    content = jpeg(random.Random(orientation), orientation, **options)
    with Image.open(BytesIO(content)) as image:
        upright = ImageOps.exif_transpose(image)
    assert ordinary_jpeg_size(content) == Size(height=upright.height, width=upright.width)


@pytest.mark.filterwarnings("ignore")  # Pillow's, about the broken metadata that is meant
def test_mutations_are_never_answered_otherwise_than_by_pillow() -> None:
    rng = random.Random(3)
    bases = [jpeg(rng, rng.randint(0, 9)) for _ in range(40)]
    answered = 0
    for _ in range(6000):
        content = bytearray(rng.choice(bases))
        pixels = content.find(b"\xff\xda") + 12
        for _ in range(rng.randint(1, 4)):
            at, change = rng.randint(3, max(pixels, 4)), rng.random()
            if change < 0.6:
                content[min(at, len(content) - 1)] = rng.choice([0, 1, 2, 3, 6, 8, 255, rng.randrange(256)])
            elif change < 0.75:
                del content[at : at + rng.randint(1, 20)]
            elif change < 0.9:
                content[at:at] = rng.randbytes(rng.randint(1, 6))
            else:
                del content[at + 1 :]
        try:
            size = ordinary_jpeg_size(bytes(content))
        except UsageError:
            assert shown(bytes(content)) is None
            continue
        if size is not None and content[:3] == b"\xff\xd8\xff":
            answered += 1
            assert size == shown(bytes(content)), bytes(content[:pixels]).hex()
    assert answered > 1000


@pytest.mark.parametrize("side", [0, 1])
def test_a_side_of_no_pixels_is_absurd(tmp_path: Path, side: int) -> None:
    content = bytearray(jpeg(random.Random(0)))
    start = max(content.find(b"\xff\xc0"), content.find(b"\xff\xc2"))
    struct.pack_into(">H", content, start + 5 + 2 * side, 0)
    (tmp_path / "flat.jpg").write_bytes(content)
    with pytest.raises(DataError, match=r"flat\.jpg: a side of 0 pixels") as caught:
        read_size(tmp_path / "flat.jpg")
    assert caught.value.kind == "absurd_image"
