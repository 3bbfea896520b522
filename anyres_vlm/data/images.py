"""Pictures of any format and mode to RGB and upright, through Pillow."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import ExifTags, Image, ImageFile, ImageOps, JpegImagePlugin, UnidentifiedImageError

from anyres_vlm.data.blobs import blob_name, read_blob
from anyres_vlm.data.headers import UNREADABLE
from anyres_vlm.errors import DataError

if TYPE_CHECKING:  # schema imports numpy, which `anyres tokens` does without
    from anyres_vlm.schema import ImageRef

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # those whose headers are counted
BYTES_LIMIT = 256 * 2**20
# What decoding takes stays below 1 GiB: up to 12 bytes a pixel of a JPEG, 20 of the rest (a WebP with alpha).
JPEG_PIXELS_LIMIT = 85_000_000
PIXELS_LIMIT = 50_000_000
BAND = 1 << 20  # pixels converted at once
UNDEFINED_WHITE = ("I", "F")  # 32-bit grey: nothing in the file says which number is white


def open_image(image: Path | ImageRef) -> Image.Image:
    """The picture in RGB, upright. Raises `DataError` for a missing, broken, truncated or absurdly large file."""
    return decode_image(read_blob(image), blob_name(image))


def decode_image(data: bytes, name: str) -> Image.Image:
    """The picture in RGB, upright; `name` is for the `DataError` that a broken, truncated or huge one raises.

    Alpha lies over white, 16-bit grey keeps its range, of an animation the first frame counts.
    """
    with opened(data, name) as image:
        return to_rgb(image, name)


@contextmanager
def opened(data: bytes, name: str) -> Iterator[ImageFile.ImageFile]:
    """The picture with its header read and its limits checked; what fails inside is a `DataError` with the name."""
    try:
        with warnings.catch_warnings():
            # Pillow warns of large or odd files; what cannot be decoded raises.
            warnings.simplefilter("ignore")
            if len(data) > BYTES_LIMIT:
                raise DataError(f"{name}: {len(data)} bytes, at most {BYTES_LIMIT} are read: scale the image down")
            with Image.open(BytesIO(data), formats=FORMATS) as image:
                limit = JPEG_PIXELS_LIMIT if isinstance(image, JpegImagePlugin.JpegImageFile) else PIXELS_LIMIT
                if image.width * image.height > limit:
                    raise DataError(
                        f"{name}: {image.width}x{image.height} is too large to decode, at most {limit} pixels are: "
                        f"scale the image down"
                    )
                yield image
    except Image.DecompressionBombError as error:
        raise DataError(f"{name}: too large to decode ({error}): scale the image down") from None
    except UnidentifiedImageError:
        raise DataError(
            f"{name}: not an image in one of the formats {', '.join(FORMATS)}: replace or remove it"
        ) from None
    except UNREADABLE as error:
        raise DataError(f"{name}: broken image ({error}): replace or remove it") from None


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 is upright and what other numbers count as."""
    number = image.getexif().get(ExifTags.Base.Orientation, 1)
    return number if number in range(1, 9) else 1


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Decode an opened picture: RGB, upright. Raises what Pillow raises; `opened` turns it into a `DataError`."""
    image.load()
    if orientation(image) != 1:
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode in UNDEFINED_WHITE:
        raise DataError(f"{name}: 32-bit grey ({image.mode}) has no defined white: save it with 8 or 16 bits")
    if image.width * image.height <= BAND:
        return _band_to_rgb(image)
    rgb = Image.new("RGB", image.size)
    for top, band in bands(image):  # whole copies in between would take most of the memory
        rgb.paste(_band_to_rgb(band), (0, top))
    return rgb


def bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Rows of a large image, about `BAND` pixels at a time, each behind the row that it begins with."""
    rows = max(BAND // image.width, 1)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _band_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow's own conversion cuts everything above 255
        return image.convert("I").point(lambda level: level * (1 / 257) + 0.5).convert("L").convert("RGB")
    if image.has_transparency_data:
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
