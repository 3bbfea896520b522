"""Read the sizes of images from their headers, after EXIF orientation, and reject sizes that are not supported.

`anyres tokens`, the index, training and inference all use `read_size`, so they accept the same images. Ordinary JPEGs
are parsed here, three times as fast as by Pillow; every other image is opened with Pillow's reader of its format, which
also decodes it later. `PIL.Image.open` is not used, because it refuses valid PNGs with large text chunks.
JPEG markers: ITU-T T.81, annex B; EXIF is a TIFF directory (CIPA DC-008); PNG chunks: ISO/IEC 15948; WebP: RFC 9649.
"""

from __future__ import annotations

import logging
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING

from anyres_vlm.data.blobs import blob_name, open_blob
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.geometry import Size, TilePlan, Tiling, plan_tiles

if TYPE_CHECKING:  # start-up time: schema imports numpy, and Pillow's readers take 40 ms
    from PIL import ImageFile

    from anyres_vlm.schema import ImageRef

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
SIGNATURES = {
    b"\xff\xd8\xff": "jpeg",
    PNG_SIGNATURE: "png",
    b"RIFF": "webp",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II": "tiff",
    b"MM": "tiff",
}
# Everything that Pillow's readers raise for broken files.
UNREADABLE = (
    *(OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, EOFError, OverflowError),
    *(struct.error, zlib.error),
)

LONGEST_SIDE = 65_500  # pixels: the limit of JPEG's own library
MOST_ELONGATED = 1000  # longer side over shorter
# Decoding stays below 1 GiB of memory: a JPEG takes up to 12 bytes a pixel, other formats 20 (a WebP with alpha).
JPEG_PIXELS_LIMIT = 85_000_000
PIXELS_LIMIT = 50_000_000
BYTES_LIMIT = 256 * 2**20  # of a file


def read_size(image: Path | ImageRef) -> Size:
    """Return height and width in pixels after the EXIF orientation, without decoding a pixel.

    Raises `DataError` for an image that is missing, empty, broken, of another format or too large to decode.
    """
    with open_blob(image) as stream:
        return size_of(stream, blob_name(image))


def plan_image(image: Path | ImageRef, tiling: Tiling) -> TilePlan:
    """Return the tile plan of one image from its header. Raises what `read_size` raises."""
    return _cached_plan(read_size(image), tiling)


_cached_plan = lru_cache(maxsize=1 << 16)(plan_tiles)  # datasets have far fewer sizes than images


def size_of(stream: IO[bytes], name: str) -> Size:
    """Return the size of the image in a stream; `name` identifies it in the `DataError` of `read_size`."""
    try:
        head = stream.read(HEAD)
        num_bytes = stream.seek(0, os.SEEK_END) if len(head) == HEAD else len(head)
        stream.seek(0)
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror}); check its disk") from None
    if num_bytes > BYTES_LIMIT:
        raise DataError(f"{name}: {num_bytes} bytes, at most {BYTES_LIMIT} are read: scale the image down")
    kind = format_of(head, name)
    try:
        size = ordinary_jpeg_size(head) if kind == "jpeg" else None
        if size is None:
            if kind == "webp" and (canvas := _webp_canvas(head)) is not None:
                _require_possible(canvas, kind, name)  # before Pillow's reader allocates the canvas
            size = _pillow_size(kind, stream, name)
    except DataError:
        raise
    except UsageError:  # raised by `Size`
        raise DataError(f"{name}: a side of 0 pixels; fetch it again or remove it", kind="absurd_image") from None
    except UNREADABLE as error:
        raise DataError(f"{name}: broken image; fetch it again or remove it") from error
    _require_possible(size, kind, name)
    return size


def format_of(head: bytes, name: str) -> str:
    """Return the image format of a file from its first bytes. Raises `DataError` if it is empty or not an image."""
    if not head:
        raise DataError(f"{name}: the file is empty; fetch it again or remove it")
    for signature, kind in SIGNATURES.items():
        if head.startswith(signature):
            return kind
    raise DataError(f"{name}: not an image; expected JPEG, PNG, WebP, GIF, BMP or TIFF")


def _require_possible(size: Size, kind: str, name: str) -> None:
    longer, shorter = max(size.height, size.width), min(size.height, size.width)
    limit = JPEG_PIXELS_LIMIT if kind == "jpeg" else PIXELS_LIMIT
    if longer > LONGEST_SIDE or longer > MOST_ELONGATED * shorter or longer * shorter > limit:
        raise DataError(
            f"{name}: {size.width}x{size.height} pixels; expected sides up to {LONGEST_SIDE:,}, at most "
            f"{MOST_ELONGATED}:1, and at most {limit:,} pixels in this format: scale the image or remove it",
            kind="absurd_image",
        )


# Pillow's readers ---------------------------------------------------------------------------------------------------


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Silence Pillow's warnings and log messages about unusual files; unreadable ones raise an error anyway."""
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def open_format(kind: str, stream: IO[bytes], header_only: bool = False) -> ImageFile.ImageFile:
    """Open an image with Pillow's reader of its format. Raises one of `UNREADABLE`.

    `header_only` leaves a PNG's pixels unread; the image can then be measured, not decoded.
    """
    from PIL import (  # start-up time: most images are ordinary JPEGs
        BmpImagePlugin,
        GifImagePlugin,
        JpegImagePlugin,
        PngImagePlugin,
        TiffImagePlugin,
        WebPImagePlugin,
    )

    match kind:
        case "jpeg":
            return JpegImagePlugin.jpeg_factory(stream)
        case "png":
            return PngImagePlugin.PngImageFile(_png_without_texts(stream, header_only))
        case "webp":
            return WebPImagePlugin.WebPImageFile(stream)
        case "gif":
            return GifImagePlugin.GifImageFile(stream)
        case "bmp":
            return BmpImagePlugin.BmpImageFile(stream)
        case _:
            if not _is_bounded(stream):
                raise SyntaxError("values of the TIFF directory overlap")
            stream.seek(0)
            return TiffImagePlugin.TiffImageFile(stream)


def orientation(image: ImageFile.ImageFile) -> int:
    """Return the EXIF orientation, 1 to 8, of an opened image; 1 (upright) where its metadata is absent or broken.

    A PNG must have been loaded before, unless it was opened for its header only. Pillow applies a TIFF's itself.
    """
    from PIL import Image  # start-up time

    if image.format == "TIFF" or not _is_bounded(BytesIO(_exif_of(image))):
        return 1
    try:
        number = Image.Image.getexif(image).get(ORIENTATION, 1)  # a PNG's own method would decode the pixels first
    except UNREADABLE:
        return 1
    return next((turn for turn in range(1, 9) if turn == number), 1)


def _exif_of(image: ImageFile.ImageFile) -> bytes:
    exif: bytes = image.info.get("exif") or b""
    while exif.startswith(b"Exif\0\0"):  # as Pillow does
        exif = exif[6:]
    return exif


def _pillow_size(kind: str, stream: IO[bytes], name: str) -> Size:
    with quiet_pillow():
        image = open_format(kind, stream, header_only=True)
        turn = orientation(image)
    width, height = image.size
    if kind == "bmp" and width >= 1 << 31:  # Pillow reads the signed number as an unsigned one
        width -= 1 << 32
        raise DataError(f"{name}: a width of {width:,} pixels; fetch it again or remove it", kind="absurd_image")
    return Size(height=width, width=height) if turn in QUARTER_TURNS else Size(height=height, width=width)


def _is_bounded(tiff: IO[bytes]) -> bool:
    """Return whether the first TIFF directory can be read without filling the memory.

    Pillow reads all values of a directory; thousands of them may refer to the same megabytes.
    """
    num_bytes = tiff.seek(0, os.SEEK_END)
    tiff.seek(0)
    head = tiff.read(16)
    big = 43 in head[2:4]  # BigTIFF
    order = ">" if head.startswith(b"MM") else "<"
    place, number, entry = (8, f"{order}Q", f"{order}HHQQ") if big else (4, f"{order}I", f"{order}HHII")
    if len(head) < place + struct.calcsize(number):
        return True  # refused by Pillow
    (start,) = struct.unpack_from(number, head, place)
    if start >= num_bytes:
        return True
    tiff.seek(start + (8 if big else 2))
    size = struct.calcsize(entry)
    entries = tiff.read(size << 16)  # at least as many as the directory has
    total = 0
    for _, kind, count, at in struct.iter_unpack(entry, entries[: len(entries) // size * size]):
        length = UNITS[kind] * count if kind < len(UNITS) else 0
        total += length if at + length <= num_bytes else 0
    return total <= num_bytes + DIRECTORY_LIMIT


def _webp_canvas(head: bytes) -> Size | None:
    """Return the stored size of a WebP; None for another header, which is left to Pillow."""
    if head[8:12] != b"WEBP" or len(head) < 30:
        return None
    if head[12:16] == b"VP8X":
        return Size(height=int.from_bytes(head[27:30], "little") + 1, width=int.from_bytes(head[24:27], "little") + 1)
    if head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return Size(height=(bits >> 14 & 0x3FFF) + 1, width=(bits & 0x3FFF) + 1)
    if head[12:16] == b"VP8 ":
        width, height = struct.unpack_from("<HH", head, 26)
        return Size(height=height & 0x3FFF, width=width & 0x3FFF)
    return None


# PNG ----------------------------------------------------------------------------------------------------------------

PNG_END = b"\0\0\0\0IEND\xae\x42\x60\x82"
UNUSED = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # but for the following texts, which may hold an orientation
# Keyword -> bytes of the longest text that is read: of XMP as many as Pillow reads, of EXIF in hex as a JPEG can hold.
TURNING_TEXTS = {b"XML:com.adobe.xmp": 1 << 20, b"Raw profile type exif": 1 << 18}


def _png_without_texts(stream: IO[bytes], header_only: bool) -> BytesIO:
    """Return a PNG without its texts and colour profile, of which Pillow refuses more than 1 MiB each or 64 MiB in all.

    Texts that may hold an orientation come right after the header. Raises `SyntaxError` for a PNG without all its
    pixels; what is cut off after them does not matter.
    """
    num_bytes = stream.seek(0, os.SEEK_END)
    stream.seek(len(PNG_SIGNATURE))
    parts: list[bytes] = []
    texts: dict[bytes, bytes] = {}
    has_pixels = False
    while len(header := stream.read(8)) == 8:
        length, name = struct.unpack(">I4s", header)
        if name == b"IEND":
            break
        if stream.tell() + length + 4 > num_bytes:
            if has_pixels and name != b"IDAT":
                break
            raise SyntaxError("the file ends before its pixels do")
        has_pixels |= name == b"IDAT"
        if header_only and name not in (b"IHDR", b"eXIf", *UNUSED):
            stream.seek(length + 4, os.SEEK_CUR)
            continue
        chunk = header + stream.read(length + 4)
        if name not in UNUSED:
            parts.append(chunk)
        elif keyword := _turning_text(name, chunk[8:-4]):
            texts[keyword] = chunk
    if not has_pixels:
        raise SyntaxError("the file has no pixels")
    return BytesIO(b"".join([PNG_SIGNATURE, *parts[:1], *texts.values(), *parts[1:], PNG_END]))


def _turning_text(name: bytes, body: bytes) -> bytes | None:
    """Return the keyword of a text chunk that may hold an orientation; None for others and for texts too long."""
    keyword, _, text = body.partition(b"\0")
    limit = TURNING_TEXTS.get(keyword)
    if limit is None or name == b"iCCP":
        return None
    compressed = name == b"zTXt"
    if name == b"iTXt":
        compressed = not text.startswith(b"\0")
        text = text[2:].partition(b"\0")[2].partition(b"\0")[2]  # after two numbers, language and translated keyword
    elif compressed:
        text = text[1:]
    if compressed:
        try:
            text = zlib.decompressobj().decompress(text, limit + 1)
        except zlib.error:
            return None
    return keyword if len(text) <= limit else None


# JPEG ---------------------------------------------------------------------------------------------------------------

HEAD = 32_768  # bytes to read: in most files the pixels start before that, even after an EXIF thumbnail

SOF, SOS, DQT = (0xC0, 0xC1, 0xC2), 0xDA, 0xDB
IGNORED = (0xC4, 0xDD, 0xFE)  # Huffman tables, restart interval, comment
APP0, APP1, APP2, APP14 = 0xE0, 0xE1, 0xE2, 0xEE
TABLE = 65  # bytes of an 8-bit quantisation table with its number

ORIENTATION = 0x0112
SHORT = 3
UNITS = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8)  # bytes of a value of each TIFF type
DIRECTORY_LIMIT = 1 << 26  # bytes that the values of a directory may have in sum, beyond those of the file itself
QUARTER_TURNS = (5, 6, 7, 8)  # orientations that swap height and width


def ordinary_jpeg_size(head: bytes) -> Size | None:
    """Return the size as shown from the first bytes of a JPEG; None if there is anything unusual about them.

    Ordinary files have one frame and at most one EXIF block, which is well-formed. Raises `UsageError`, as `Size`
    does, for a side of 0 pixels.
    """
    frame: bytes | None = None
    orientation = 0  # no EXIF so far
    at = 2
    while at + 4 <= len(head) and head[at] == 0xFF:
        marker, length = head[at + 1], head[at + 2] << 8 | head[at + 3]
        end = at + 2 + length
        if length < 2 or end > len(head):
            return None
        body = head[at + 4 : end]
        at = end
        if marker == SOS:
            return None if frame is None else _frame_size(frame, orientation)
        if marker in SOF and frame is None:
            frame = body
        elif marker == APP1 and orientation == 0 and body.startswith(b"Exif\0\0"):
            found = _exif_orientation(body[6:])
            if found is None:
                return None
            orientation = found
        elif not _harmless(marker, body):
            return None
    return None


def _harmless(marker: int, body: bytes) -> bool:
    """Return whether a segment neither affects the size nor is refused by Pillow."""
    if marker == DQT:
        return len(body) % TABLE == 0 and all(body[at] < 16 for at in range(0, len(body), TABLE))
    if marker == APP0:
        return len(body) >= 14
    if marker == APP2:
        return body.startswith(b"ICC_PROFILE\0") and len(body) >= 14
    return marker in IGNORED or (marker == APP14 and len(body) >= 12)


def _frame_size(frame: bytes, orientation: int) -> Size | None:
    if len(frame) < 6 or frame[0] != 8 or frame[5] not in (1, 3, 4) or len(frame) != 6 + 3 * frame[5]:
        return None
    height, width = frame[1] << 8 | frame[2], frame[3] << 8 | frame[4]
    if orientation in QUARTER_TURNS:
        height, width = width, height
    return Size(height=height, width=width)


def _exif_orientation(tiff: bytes) -> int | None:
    """Return the orientation in the first directory, 1 if it has none; None for a malformed directory."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 14:
        return None
    (start,) = struct.unpack_from(f"{order}I", tiff, 4)
    if start < 8 or start + 2 > len(tiff):
        return None
    (count,) = struct.unpack_from(f"{order}H", tiff, start)
    if start + 2 + 12 * count + 4 > len(tiff):
        return None
    value: int | None = None
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind, number, place = struct.unpack_from(f"{order}HHII", tiff, entry)
        size = UNITS[kind] * number if 0 < kind < len(UNITS) else 0
        if size == 0 or (size > 4 and place + size > len(tiff)):
            return None
        if tag == ORIENTATION:
            if kind != SHORT or number != 1 or value is not None:
                return None
            (value,) = struct.unpack_from(f"{order}H", tiff, entry + 8)
    return value or 1
