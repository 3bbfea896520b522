"""The size of an image as shown, from its header alone: what an index of a dataset and a token count are made of.

`PIL.Image.open` is not used because it refuses large images, whose size is as readable as any other's.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING

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

from anyres_vlm.data.blobs import blob_name, open_blob
from anyres_vlm.data.jpeg import HEAD, QUARTER_TURNS, ordinary_jpeg_size
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.geometry import Size

if TYPE_CHECKING:  # schema imports numpy, which `anyres tokens` does without
    from anyres_vlm.schema import ImageRef

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_CHUNKS = frozenset({b"IHDR", b"eXIf", b"tEXt", b"zTXt", b"iTXt", b"IEND"})  # size and orientation are in these
UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, EOFError, struct.error)


def read_size(image: Path | ImageRef) -> Size:
    """Height and width in pixels after the EXIF orientation; no pixel is decoded.

    JPEG, PNG, WebP, GIF, BMP and TIFF. Raises `DataError` for an image that is missing, empty, broken or none.
    """
    with open_blob(image) as stream:
        return _size(stream, blob_name(image))


def _size(stream: IO[bytes], name: str) -> Size:
    try:
        head = stream.read(HEAD)
        stream.seek(0)
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror}); check its disk") from None
    if not head:
        raise DataError(f"{name}: the file is empty; fetch it again or remove it")
    reader = next((reader for signature, reader in READERS if head.startswith(signature)), None)
    if reader is None:
        raise DataError(f"{name}: not an image; expected JPEG, PNG, WebP, GIF, BMP or TIFF")
    try:
        if reader is _read_jpeg and (size := ordinary_jpeg_size(head)):
            return size
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about odd metadata: a size was found or an error is raised
            return reader(stream)
    except Image.DecompressionBombError:  # only Pillow's WebP reader allocates, and therefore checks, this early
        raise DataError(f"{name}: too many pixels for WebP; scale the image down") from None
    except UsageError:  # what a size says of a side without pixels
        raise DataError(f"{name}: a side of 0 pixels; fetch it again or remove it", kind="absurd_image") from None
    except UNREADABLE as error:  # Pillow's readers raise all of these, with words about their insides
        raise DataError(f"{name}: broken image; fetch it again or remove it") from error


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


_read_jpeg = _pillow_reader(JpegImagePlugin.jpeg_factory)

READERS: tuple[tuple[bytes, Callable[[IO[bytes]], Size]], ...] = (
    (b"\xff\xd8\xff", _read_jpeg),
    (PNG_SIGNATURE, _read_png),
    (b"RIFF", _pillow_reader(WebPImagePlugin.WebPImageFile)),
    (b"GIF8", _pillow_reader(GifImagePlugin.GifImageFile)),
    (b"BM", _pillow_reader(BmpImagePlugin.BmpImageFile)),
    (b"II", _read_tiff),
    (b"MM", _read_tiff),
)
