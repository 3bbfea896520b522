"""Sizes that need Pillow's readers: every format but ordinary JPEG. Apart, for they take 30 ms to import.

`PIL.Image.open` is not used because it refuses large images, whose size is as readable as any other's.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable
from io import BytesIO
from typing import IO

from PIL import (
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from anyres_vlm.data.jpeg import QUARTER_TURNS
from anyres_vlm.errors import DataError
from anyres_vlm.geometry import Size

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_CHUNKS = frozenset({b"IHDR", b"eXIf", b"tEXt", b"zTXt", b"iTXt", b"IEND"})  # size and orientation are in these


def read_format(name: str, stream: IO[bytes]) -> Size:
    """Height and width as shown, of a stream whose first bytes are those of a format. Raises what Pillow's reader does.

    Raises `DataError` for a WebP that is too large: only that reader allocates, and therefore checks, this early.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about odd metadata: a size was found or an error is raised
        try:
            return READERS[name](stream)
        except Image.DecompressionBombError:
            raise DataError("too many pixels for WebP; scale the image down") from None


def _pillow_reader(factory: Callable[[IO[bytes]], ImageFile.ImageFile]) -> Callable[[IO[bytes]], Size]:
    def read(stream: IO[bytes]) -> Size:
        image = factory(stream)
        return _upright(image, image.getexif())

    return read


def _read_png(stream: IO[bytes]) -> Size:
    """EXIF and XMP may stand behind the pixels, and Pillow would decode these to get there: they are left out.

    A file that was cut short has no end and is refused by Pillow.
    """
    parts = [stream.read(len(PNG_SIGNATURE))]
    while len(header := stream.read(8)) == 8:
        length, name = struct.unpack(">I4s", header)
        if name in PNG_CHUNKS:
            parts += [header, stream.read(length + 4)]
        else:
            stream.seek(length + 4, 1)  # the checksum too
    image = PngImagePlugin.PngImageFile(BytesIO(b"".join(parts)))
    return _upright(image, Image.Image.getexif(image))


def _read_tiff(stream: IO[bytes]) -> Size:
    """Pillow's TIFF reader has applied the orientation to the size already."""
    return _upright(TiffImagePlugin.TiffImageFile(stream), Image.Exif())


def _upright(image: ImageFile.ImageFile, exif: Image.Exif) -> Size:
    width, height = image.size
    if exif.get(ExifTags.Base.Orientation) in QUARTER_TURNS:
        width, height = height, width
    return Size(height=height, width=width)


READERS: dict[str, Callable[[IO[bytes]], Size]] = {
    "jpeg": _pillow_reader(JpegImagePlugin.jpeg_factory),
    "png": _read_png,
    "webp": _pillow_reader(WebPImagePlugin.WebPImageFile),
    "gif": _pillow_reader(GifImagePlugin.GifImageFile),
    "bmp": _pillow_reader(BmpImagePlugin.BmpImageFile),
    "tiff": _read_tiff,
}
