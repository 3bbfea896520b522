"""Augmentation keeps geometry and depends on its key only, in every process."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from anyres_vlm.config import AugmentConfig
from anyres_vlm.data.tiling import Augmentation, tile_image
from anyres_vlm.geometry import Grid, Size, Tiling, count_tokens, plan_tiles

ALWAYS = AugmentConfig(probability=1.0)


@pytest.fixture(scope="module")
def augmentation() -> Augmentation:
    return Augmentation(ALWAYS)


def chart(height: int = 90, width: int = 120) -> np.ndarray:
    """Black and white fields and a red one, so that a shifted edge shows whatever the colours become."""
    pixels = np.full((height, width, 3), 215, np.uint8)
    pixels[height // 3 : height // 2, width // 4 :] = 60
    pixels[: height // 4, : width // 5] = (200, 40, 40)
    return pixels


def test_the_key_alone_decides(augmentation: Augmentation) -> None:
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 1, 1), (-1, 0, 0)]
    pictures = [augmentation(chart(), key) for key in keys]
    augmentation(chart(30, 30), (9, 9, 9))
    for key, picture in zip(keys, pictures, strict=True):
        assert np.array_equal(augmentation(chart(), key), picture)
        assert sum(np.array_equal(picture, other) for other in pictures) == 1
    again = Augmentation(ALWAYS)
    assert np.array_equal(again(chart(), keys[3]), pictures[3])


def test_another_process_gives_the_same_pixels_without_network(augmentation: Augmentation) -> None:
    script = """
import socket, sys
def refuse(*arguments): raise AssertionError("a network look-up")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import anyres_vlm.data.tiling as augment
assert "albumentations" not in sys.modules, "importing is light"
import numpy as np
from anyres_vlm.config import AugmentConfig
pixels = np.arange(60 * 80 * 3, dtype=np.uint32).reshape(60, 80, 3) // 57 % 256
changed = augment.Augmentation(AugmentConfig(probability=1.0))(pixels.astype(np.uint8), (1, 2, 3))
sys.stdout.buffer.write(changed.tobytes())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    pixels = (np.arange(60 * 80 * 3, dtype=np.uint32).reshape(60, 80, 3) // 57 % 256).astype(np.uint8)
    assert done.stdout == augmentation(pixels, (1, 2, 3)).tobytes()
    assert b"rror" not in done.stderr


@pytest.mark.parametrize("grid", ["1x1", "2x2", "3x3"])
@pytest.mark.parametrize(("height", "width"), [(90, 120), (300, 20), (400, 700)])
@pytest.mark.parametrize("mode", ["fast", "exact"])
def test_geometry_and_token_counts_never_change(
    augmentation: Augmentation, grid: str, height: int, width: int, mode: str
) -> None:
    stream = BytesIO()
    Image.fromarray(chart(height, width)).save(stream, "PNG")
    tiling = Tiling.from_grid(Grid.parse(grid), tile=56)
    plan = plan_tiles(Size(height=height, width=width), tiling)
    plain = tile_image(stream.getvalue(), plan, "chart", mode)
    padding = (plain[1:] == 0).all(axis=1, keepdims=True)  # nothing in the chart is black
    for sample in range(5):
        changed = tile_image(stream.getvalue(), plan, "chart", mode, partial(augmentation, key=(0, 0, sample)))
        assert changed.shape == plain.shape == (plan.num_tiles, 3, 56, 56)
        assert not np.array_equal(changed, plain)
        assert not (changed[1:] * padding).any()
        # Light stays light and dark dark where they were: no pixel of a field changes sides.
        grey, other = plain.mean(1), changed.mean(1)
        light, dark = other[grey > 210], other[(grey > 55) & (grey < 65)]
        assert light.min() > dark.mean() + 60
    assert count_tokens(plan.image, tiling) == plan.total_tokens


def test_off_by_zero_probability() -> None:
    assert np.array_equal(Augmentation(AugmentConfig(probability=0.0))(chart(), (0, 0, 0)), chart())
