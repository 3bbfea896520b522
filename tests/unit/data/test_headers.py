"""Sizes from headers against Pillow's own full decoding, and what is said about files that are no image."""

from __future__ import annotations

import itertools
import random
import struct
import warnings
import zlib
from io import BytesIO
from pathlib import Path

import pytest
from PIL import ExifTags, Image, ImageOps

from anyres_vlm.data.headers import IMAGE_SUFFIXES, read_size
from anyres_vlm.errors import DataError
from anyres_vlm.geometry import Size

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


@pytest.mark.parametrize("image_format", FORMATS)
def test_height_and_width_of_every_format(tmp_path: Path, image_format: str) -> None:
    for width, height in [(30, 20), (1, 1), (7, 400)]:
        file = tmp_path / "image"  # the content tells the format, not the name
        file.write_bytes(encoded(picture(width, height), image_format))
        assert read_size(file) == Size(height=height, width=width)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "I;16", "CMYK"])
def test_modes_do_not_matter(tmp_path: Path, mode: str) -> None:
    file = tmp_path / "image"
    Image.new(mode, (30, 20)).save(file, format="TIFF" if mode == "CMYK" else "PNG")
    assert read_size(file) == Size(height=20, width=30)


@pytest.mark.parametrize(("image_format", "value"), [*itertools.product(WITH_EXIF, range(10))])
def test_orientation_as_pillow_applies_it(tmp_path: Path, image_format: str, value: int) -> None:
    file = tmp_path / "image"
    file.write_bytes(encoded(picture(), image_format, exif=orientation(value)))
    with Image.open(file) as image:
        shown = ImageOps.exif_transpose(image)
    assert read_size(file) == as_size(shown)
    assert (as_size(shown) == Size(height=30, width=20)) == (value in (5, 6, 7, 8))


@pytest.mark.parametrize("place", ["before the pixels", "behind the pixels"])
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


def test_animations_have_the_size_of_their_canvas(tmp_path: Path) -> None:
    frames = [picture(), ImageOps.invert(picture())]
    for image_format in ("GIF", "PNG", "WEBP", "TIFF"):
        file = tmp_path / "animation"
        file.write_bytes(encoded(frames[0], image_format, save_all=True, append_images=frames[1:]))
        assert read_size(file) == Size(height=20, width=30)


def test_no_pixel_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {name: tmp_path / name for name in WITH_EXIF}
    for name, file in files.items():
        file.write_bytes(encoded(picture(), name, exif=orientation(6)))

    def decode(image: Image.Image) -> None:
        raise AssertionError(f"{image.format} was decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    for file in files.values():
        assert read_size(file) == Size(height=30, width=20)


def huge(image_format: str, side: int) -> bytes:
    """A file whose header tells `side` x `side` pixels, which need not be there."""
    small = bytearray(encoded(picture(), image_format))
    if image_format == "PNG":
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        return SIGNATURE + header + bytes(small[len(SIGNATURE) + len(header) :])
    where, form = {"JPEG": (small.find(b"\xff\xc0") + 5, ">HH"), "GIF": (6, "<HH"), "BMP": (18, "<ii")}[image_format]
    struct.pack_into(form, small, where, side, side)
    return bytes(small)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "GIF", "BMP"])
def test_huge_images_are_measured_without_a_warning(tmp_path: Path, image_format: str) -> None:
    """4.3 billion pixels; `PIL.Image.open` refuses more than 179 million."""
    file = tmp_path / "huge"
    file.write_bytes(huge(image_format, 65_500))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_size(file) == Size(height=65_500, width=65_500)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(file)


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


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jpg: no such file; check the path"):
        read_size(tmp_path / "gone.jpg")
    with pytest.raises(DataError, match=f"{tmp_path.name}: a folder, not a file"):
        read_size(tmp_path)
    with pytest.raises(DataError, match=r"cannot be opened \(File name too long\)"):
        read_size(tmp_path / ("x" * 500))


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


def test_cut_png_is_refused(tmp_path: Path) -> None:
    """Its chunks are walked to the end, so this costs nothing."""
    file = tmp_path / "cut.png"
    file.write_bytes(encoded(picture(), "PNG")[:-20])
    with pytest.raises(DataError, match=r"cut\.png: broken image"):
        read_size(file)


def test_suffixes_are_lower_case_with_a_dot() -> None:
    assert {f".{name}" for name in ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")} == IMAGE_SUFFIXES
