"""Pictures from disk, as RGB and upright."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from PIL import Image, ImageOps, UnidentifiedImageError

from anyres_vlm.data.blobs import blob_name, open_blob
from anyres_vlm.errors import DataError

if TYPE_CHECKING:  # schema imports numpy, which `anyres tokens` does without
    from anyres_vlm.schema import ImageRef

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # those whose headers are counted


def open_image(image: Path | ImageRef) -> Image.Image:
    """The picture in RGB, upright. Raises `DataError` for a missing, broken, truncated or absurdly large file."""
    with open_blob(image) as stream, _opened(stream, blob_name(image)) as picture:
        return ImageOps.exif_transpose(picture).convert("RGB")


@contextmanager
def _opened(stream: BinaryIO, name: str) -> Iterator[Image.Image]:
    try:
        with warnings.catch_warnings():
            # Pillow warns of large or odd files; what cannot be decoded raises.
            warnings.simplefilter("ignore")
            with Image.open(stream, formats=FORMATS) as image:
                yield image
    except Image.DecompressionBombError as error:
        raise DataError(f"{name}: too large to decode ({error}): scale the image down") from None
    except UnidentifiedImageError:
        raise DataError(
            f"{name}: not an image in one of the formats {', '.join(FORMATS)}: replace or remove it"
        ) from None
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{name}: broken image ({error}): replace or remove it") from None
