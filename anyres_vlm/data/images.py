"""Pictures from disk, as RGB and upright."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from anyres_vlm.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # those whose headers are counted


def open_image(path: Path) -> Image.Image:
    """The picture in RGB, upright. Raises `DataError` for a missing, broken, truncated or absurdly large file."""
    with _opened(path) as image:
        upright = ImageOps.exif_transpose(image)
        return upright.convert("RGB")


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with warnings.catch_warnings():
            # Pillow warns of large or odd files; what cannot be decoded raises.
            warnings.simplefilter("ignore")
            with Image.open(path, formats=FORMATS) as image:
                yield image
    except FileNotFoundError:
        raise DataError(f"{path}: no such image; check the path and the image folder") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: too large to decode ({error}): scale the image down") from None
    except UnidentifiedImageError:
        raise DataError(
            f"{path}: not an image in one of the formats {', '.join(FORMATS)}: replace or remove it"
        ) from None
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path}: broken image ({error}): replace or remove it") from None
