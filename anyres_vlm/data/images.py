"""Images from disk: sizes out of the headers, pixels as RGB, the EXIF orientation applied to both."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from anyres_vlm.errors import DataError
from anyres_vlm.geometry import Size

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
TURNED = frozenset({5, 6, 7, 8})  # EXIF orientations that swap height and width
MAX_PIXELS = 2**28  # decoded pixels that are still taken for a picture: 16384 x 16384, 805 MB as RGB


def read_size(path: Path) -> Size:
    """Height and width as shown, out of the file's header; no pixel is decoded. Raises `DataError`."""
    with _opened(path) as image:
        width, height = image.size
        if image.getexif().get(ExifTags.Base.Orientation) in TURNED:
            width, height = height, width
        return Size(height=height, width=width)


def open_image(path: Path) -> Image.Image:
    """The picture in RGB, upright. Raises `DataError` for a missing, broken, truncated or absurdly large file."""
    with _opened(path) as image:
        if image.width * image.height > MAX_PIXELS:
            raise DataError(f"{path}: {image.width}x{image.height} pixels exceed {MAX_PIXELS:,}: scale the image down")
        upright = ImageOps.exif_transpose(image)
        return upright.convert("RGB")


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with warnings.catch_warnings():
            # Pillow's warnings about large or odd files: the size is checked here, what cannot be decoded raises.
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                yield image
    except FileNotFoundError:
        raise DataError(f"{path}: no such image; check the path and the image folder") from None
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: not an image that can be read ({error}): replace or remove it") from None
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: broken image ({error}): replace or remove it") from None
