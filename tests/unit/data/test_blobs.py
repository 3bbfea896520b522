"""Slices behave like files of their own."""

from __future__ import annotations

import os
import pickle
import random
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from anyres_vlm.data.blobs import open_blob, read_blob
from anyres_vlm.data.headers import read_size
from anyres_vlm.data.images import open_image
from anyres_vlm.errors import DataError
from anyres_vlm.geometry import Size
from anyres_vlm.schema import ImageRef

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


@pytest.fixture(params=["file", "slice", "rest", "memory"])
def blob(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[bytes, ImageRef]:
    content = random.Random(0).randbytes(30_000)
    path = tmp_path / "blob"
    path.write_bytes(
        {"file": b"", "memory": b""}.get(request.param, b"before") + content + b"behind" * (request.param == "slice")
    )
    return content, {
        "file": ImageRef("b", path),
        "slice": ImageRef("b", path, 6, len(content)),
        "rest": ImageRef("b", path, 6),
        "memory": ImageRef("b", data=content),
    }[request.param]


def test_reading_and_seeking_as_in_a_file(blob: tuple[bytes, ImageRef]) -> None:
    content, reference = blob
    assert read_blob(reference) == content
    assert read_blob(pickle.loads(pickle.dumps(reference))) == content
    rng = random.Random(1)
    with open_blob(reference) as stream:
        oracle = BytesIO(content)
        for _ in range(300):
            whence = rng.choice([os.SEEK_SET, os.SEEK_CUR, os.SEEK_END])
            offset = rng.randint(-len(content), len(content))
            start = (0, oracle.tell(), len(content))[whence]
            if start + offset >= 0:
                assert stream.seek(offset, whence) == oracle.seek(offset, whence)
            count = rng.choice([0, 1, 100, 9000, -1])
            assert stream.read(count) == oracle.read(count)
            assert stream.tell() == oracle.tell()


@pytest.mark.parametrize("image_format", FORMATS)
def test_images_inside_another_file(tmp_path: Path, image_format: str) -> None:
    """TIFF is read from its end, PNG chunk by chunk, the others from the start."""
    picture = Image.radial_gradient("L").resize((37, 21)).convert("RGB")
    buffer = BytesIO()
    picture.save(buffer, image_format)
    content = buffer.getvalue()
    (tmp_path / "a.tar").write_bytes(b"\xff\xd8\xff" * 99 + content + b"\xff\xd8\xff" * 99)
    for reference in (ImageRef("x", tmp_path / "a.tar", 297, len(content)), ImageRef("x", data=content)):
        assert read_size(reference) == Size(height=21, width=37)
        assert open_image(reference).tobytes() == open_image(ImageRef("y", data=content)).tobytes()
    for cut in (0, 5, len(content) // 2):
        with pytest.raises(DataError, match=r"^member 7: "):
            open_image(ImageRef("member 7", tmp_path / "a.tar", 297, cut))


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"12345")
    with pytest.raises(DataError, match=r"^m: .*short ends before it: expected 9 bytes at 3, got 2; the file changed"):
        read_blob(ImageRef("m", tmp_path / "short", 3, 9))
    for read in (read_blob, read_size, open_image):
        with pytest.raises(DataError, match=r"^m: no such file; check the path"):
            read(ImageRef("m", tmp_path / "none", 3, 9))
        with pytest.raises(DataError, match=r"^m: a folder, not a file"):
            read(ImageRef("m", tmp_path))
        with pytest.raises(DataError, match=r"^m: cannot be opened .*null"):
            read(ImageRef("m", Path("a\0b")))
        with pytest.raises(DataError, match=r"^m: cannot be opened \(File name too long\)"):
            read(ImageRef("m", tmp_path / ("x" * 500)))
