"""Hostile pictures, and what the project makes of one: a `DataError`, or the picture that Pillow sees, too."""

from __future__ import annotations

import struct
import warnings
import zlib
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image, ImageOps
from target import Target

from anyres_vlm.data.headers import ordinary_jpeg_size, plan_image, read_size
from anyres_vlm.data.images import open_image
from anyres_vlm.data.tiling import cut_tiles, tile_image
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.geometry import Size, Tiling
from anyres_vlm.schema import ImageRef

TILING = Tiling(pinpoints=((28, 56), (56, 28), (56, 56), (84, 28), (28, 84)), tile=28, patch=14)
WIDTH, HEIGHT = 46, 30
ORIENTATION = 0x0112


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """A file of it."""
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def photo(mode: str = "RGB", width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """A picture without symmetry."""
    rows, columns = np.mgrid[:height, :width]
    levels = np.stack([columns * 255 // width, rows * 255 // height, (rows + columns) % 256], -1).astype(np.uint8)
    return Image.fromarray(levels).convert(mode)


def turned(orientation: int) -> Image.Exif:
    """EXIF that says how the camera was held."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def bomb(width: int, height: int, colour: int = 2) -> bytes:
    """A PNG of one black row for `height` of them: it says more pixels than it has."""
    rows = zlib.compress(bytes(1 + width * (3 if colour == 2 else 1)), 9)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in (
            (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)),
            (b"IDAT", rows),
            (b"IEND", b""),
        )
    )


@cache
def good_pictures() -> dict[str, bytes]:
    """Odd pictures that are in order: each must be read."""
    rgb, clear = photo(), photo("P")
    frames = [photo(width=WIDTH + 1).crop((0, 0, WIDTH, HEIGHT)), ImageOps.mirror(rgb)]
    grey16 = Image.fromarray(np.linspace(0, 65_535, WIDTH * HEIGHT).astype(np.uint16).reshape(HEIGHT, WIDTH))
    pictures = {
        "jpeg": encoded(rgb, "JPEG"),
        "jpeg_grey": encoded(photo("L"), "JPEG"),
        "jpeg_cmyk": encoded(photo("CMYK"), "JPEG"),
        "jpeg_progressive": encoded(rgb, "JPEG", progressive=True),
        "jpeg_icc_junk": encoded(rgb, "JPEG", icc_profile=bytes(range(256)) * 300),
        "jpeg_bytes_behind": encoded(rgb, "JPEG") + b"junk",
        "png": encoded(rgb, "PNG"),
        "png_icc_junk": encoded(rgb, "PNG", icc_profile=b"junk" * 99),
        "png_16_bit": encoded(grey16, "PNG"),
        "png_palette": encoded(clear, "PNG"),
        "png_palette_clear": encoded(clear, "PNG", transparency=bytes(range(0, 256, 4))),
        "png_alpha": encoded(photo("RGBA"), "PNG"),
        "png_1_bit": encoded(photo("1"), "PNG"),
        "png_animated": encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "gif": encoded(clear, "GIF"),
        "gif_animated": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=40, loop=0),
        "webp": encoded(rgb, "WEBP"),
        "webp_lossless": encoded(photo("RGBA"), "WEBP", lossless=True),
        "webp_animated": encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "bmp": encoded(rgb, "BMP"),
        "tiff": encoded(rgb, "TIFF"),
        "tiff_16_bit": encoded(grey16, "TIFF"),
        "tiff_cmyk_lzw": encoded(photo("CMYK"), "TIFF", compression="tiff_lzw"),
    }
    for number in range(1, 9):
        exif = turned(number)
        pictures |= {f"{kind}_turned_{number}": encoded(rgb, kind, exif=exif) for kind in ("JPEG", "PNG", "WEBP")}
        pictures[f"TIFF_turned_{number}"] = encoded(rgb, "TIFF", tiffinfo={ORIENTATION: number})
    return pictures


@cache
def bad_pictures() -> dict[str, bytes]:
    """Each must be refused, by the header's reader or where it is decoded."""
    jpeg = good_pictures()["jpeg"]
    return {
        "empty": b"",
        "text": b"<html>404 Not Found</html>",
        "heif": b"\0\0\0\x18ftypheic" + bytes(99),
        "bomb": bomb(65_000, 65_000),
        "bomb_grey": bomb(16_000, 11_000, 0),
        "thin": encoded(Image.new("L", (1, 30_000)), "PNG"),
        "flat": encoded(Image.new("L", (65_500, 1)), "JPEG"),
        "no_width": bomb(0, 7),
        "cut_jpeg": jpeg[: len(jpeg) // 2],
        "float": encoded(Image.new("F", (WIDTH, HEIGHT)), "TIFF"),
        "jpeg_head_alone": jpeg[:2],
        "png_head_alone": b"\x89PNG\r\n\x1a\n",
    }


def progressive_cut() -> list[bytes]:
    """A progressive JPEG without its last scans: one file for each number of scans that are left, the end in order."""
    whole = encoded(photo(width=200, height=150), "JPEG", progressive=True)
    starts = [at for at in range(len(whole) - 1) if whole[at : at + 2] == b"\xff\xda"]
    return [whole[:start] + b"\xff\xd9" for start in starts]


def check_picture(data: bytes, folder: Path) -> bool:
    """Read it by all the ways of training and inference; True where it was read."""
    file = folder / "picture.jpg"  # whatever it is
    file.write_bytes(data)
    image = ImageRef(str(file), file)
    size, shown = _or_none(read_size, image), _or_none(open_image, image)
    if size is not None:
        assert size == _or_none(read_size, ImageRef("memory", data=data)), "a file and memory differ"
    if shown is None:
        return False
    assert shown.mode == "RGB"
    seen = _pillow_size(data)
    assert seen is None or (shown.width, shown.height) == seen, f"{shown.size} decoded, {seen} in Pillow"
    if size is None:
        return False
    assert (size.width, size.height) == shown.size, f"{size} in the header, {shown.size} decoded"
    plan = _or_none(plan_image, image, TILING)
    if plan is None:
        return False
    cuts = [tile_image(data, plan, "memory", mode) for mode in ("exact", "fast")]
    for tiles in (*cuts, cut_tiles(shown, plan)):
        assert tiles.shape == (plan.num_tiles, 3, 28, 28)
        assert tiles.dtype == np.uint8
    return True


def check_jpeg_head(data: bytes, folder: Path) -> bool:
    """The fast reader of JPEG headers has Pillow's size, or leaves the answer to Pillow."""
    try:
        size = ordinary_jpeg_size(data)
    except UsageError:
        return False
    if size is None:
        return False
    seen = _pillow_size(data)
    assert seen is None or Size(height=seen[1], width=seen[0]) == size, f"{size}, but {seen} in Pillow"
    return True


def check_header(data: bytes, folder: Path) -> bool:
    """A size or a `DataError`."""
    return _or_none(read_size, ImageRef("memory", data=data)) is not None


def _or_none(read: Any, *arguments: Any) -> Any:
    try:
        return read(*arguments)
    except DataError:
        return None


def _pillow_size(data: bytes) -> tuple[int, int] | None:
    """What Pillow alone makes of it, (width, height); None where it raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ImageOps.exif_transpose(Image.open(BytesIO(data))).size
        except Exception:
            return None


@st.composite
def damaged(draw: st.DrawFn, only: str = "") -> bytes:
    """A file of any format with bytes changed, cut out, put in or repeated."""
    names = [name for name in good_pictures() if name.lower().startswith(only)]
    data = bytearray(good_pictures()[draw(st.sampled_from(names))])
    for _ in range(draw(st.integers(1, 4))):
        near = min(len(data), draw(st.sampled_from([64, 700, 1 << 20])))  # most of the structure is at the start
        at, length = draw(st.integers(0, near)), draw(st.integers(0, 16))
        how = draw(st.sampled_from(["set", "set", "flip", "insert", "remove", "cut", "repeat"]))
        if how == "set":
            data[at : at + length] = draw(st.binary(min_size=length, max_size=length))
        elif how == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "insert":
            data[at:at] = draw(st.sampled_from([b"\0" * 8, b"\xff" * 8, b"\xff\xd9", b"\x7f\xff\xff\xff"]))
        elif how == "remove":
            del data[at : at + length]
        elif how == "cut":
            del data[at:]
        elif how == "repeat":
            data[at:at] = data[at : at + 4 * length]
    return bytes(data)


TARGETS = {
    "pictures, damaged": Target(damaged(), check_picture),
    "picture headers, damaged": Target(damaged(), check_header, coverage=True),
    "JPEG header": Target(damaged("jpeg"), check_jpeg_head, coverage=True),
}
