"""Sizes of JPEGs without Pillow's reader against it, on files that are whole, mutated and cut short."""

from __future__ import annotations

import random
import struct
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageOps

from anyres_vlm.data.headers import read_size
from anyres_vlm.data.jpeg import ordinary_jpeg_size
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.geometry import Size


def jpeg(rng: random.Random, orientation: int = 0, **options: Any) -> bytes:
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
        exif[0x010F], exif[0x0110] = "Maker", "Camera " * rng.randint(1, 9)
        exif[0x8769] = {0x9003: "2020:01:01 00:00:00"}
        options["exif"] = exif
    buffer = BytesIO()
    image = Image.new(rng.choice(["RGB", "L", "CMYK"]), (rng.randint(1, 90), rng.randint(1, 90)))
    image.save(buffer, format="JPEG", progressive=rng.random() < 0.3, **options)
    return buffer.getvalue()


def shown(content: bytes) -> Size | None:
    """What Pillow shows, from the header; None where it refuses the file."""
    try:
        with Image.open(BytesIO(content), formats=["JPEG", "MPO"]) as image:
            size = Size(height=image.height, width=image.width)
            turned = image.getexif().get(0x0112) in (5, 6, 7, 8)
    except (OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, struct.error):
        return None
    return Size(height=size.width, width=size.height) if turned else size


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("options", [{}, {"comment": b"hi"}, {"icc_profile": b"x" * 300}, {"dpi": (72, 72)}])
def test_ordinary_files_are_answered_as_pillow_shows_them(orientation: int, options: dict[str, Any]) -> None:
    content = jpeg(random.Random(orientation), orientation, **options)
    with Image.open(BytesIO(content)) as image:
        upright = ImageOps.exif_transpose(image)
    assert ordinary_jpeg_size(content) == Size(height=upright.height, width=upright.width)


@pytest.mark.filterwarnings("ignore")  # Pillow's, about the broken metadata that is meant
def test_mutations_are_never_answered_otherwise_than_by_pillow() -> None:
    rng = random.Random(3)
    bases = [jpeg(rng, rng.randint(0, 9)) for _ in range(40)]
    answered = 0
    for _ in range(6000):
        content = bytearray(rng.choice(bases))
        pixels = content.find(b"\xff\xda") + 12
        for _ in range(rng.randint(1, 4)):
            at, change = rng.randint(3, max(pixels, 4)), rng.random()
            if change < 0.6:
                content[min(at, len(content) - 1)] = rng.choice([0, 1, 2, 3, 6, 8, 255, rng.randrange(256)])
            elif change < 0.75:
                del content[at : at + rng.randint(1, 20)]
            elif change < 0.9:
                content[at:at] = rng.randbytes(rng.randint(1, 6))
            else:
                del content[at + 1 :]
        try:
            size = ordinary_jpeg_size(bytes(content))
        except UsageError:
            assert shown(bytes(content)) is None
            continue
        if size is not None and content[:3] == b"\xff\xd8\xff":
            answered += 1
            assert size == shown(bytes(content)), bytes(content[:pixels]).hex()
    assert answered > 1000


@pytest.mark.parametrize("side", [0, 1])
def test_a_side_of_no_pixels_is_absurd(tmp_path: Path, side: int) -> None:
    content = bytearray(jpeg(random.Random(0)))
    start = max(content.find(b"\xff\xc0"), content.find(b"\xff\xc2"))
    struct.pack_into(">H", content, start + 5 + 2 * side, 0)
    (tmp_path / "flat.jpg").write_bytes(content)
    with pytest.raises(DataError, match=r"flat\.jpg: a side of 0 pixels") as caught:
        read_size(tmp_path / "flat.jpg")
    assert caught.value.kind == "absurd_image"
