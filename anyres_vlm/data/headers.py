"""The size of an image as shown, from its header alone: what an index of a dataset and a token count are made of."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import IO, TYPE_CHECKING

from anyres_vlm.data.blobs import blob_name, open_blob
from anyres_vlm.data.jpeg import HEAD, ordinary_jpeg_size
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.geometry import Size

if TYPE_CHECKING:  # schema imports numpy, which `anyres tokens` does without
    from anyres_vlm.schema import ImageRef

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})

FORMATS = {
    b"\xff\xd8\xff": "jpeg",
    b"\x89PNG\r\n\x1a\n": "png",
    b"RIFF": "webp",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II": "tiff",
    b"MM": "tiff",
}
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
    kind = next((kind for signature, kind in FORMATS.items() if head.startswith(signature)), None)
    if kind is None:
        raise DataError(f"{name}: not an image; expected JPEG, PNG, WebP, GIF, BMP or TIFF")
    try:
        if kind == "jpeg" and (size := ordinary_jpeg_size(head)):
            return size
        from anyres_vlm.data.pillow_headers import read_format  # start-up time: most images are ordinary JPEGs

        return read_format(kind, stream)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    except UsageError:  # what a size says of a side without pixels
        raise DataError(f"{name}: a side of 0 pixels; fetch it again or remove it", kind="absurd_image") from None
    except UNREADABLE as error:  # Pillow's readers raise all of these, with words about their insides
        raise DataError(f"{name}: broken image; fetch it again or remove it") from error
