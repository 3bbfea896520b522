"""Pictures of questions with their tiles, small and inside the page."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image

from anyres_vlm.data.images import open_image
from anyres_vlm.errors import DataError
from anyres_vlm.geometry import Tiling

WIDTH = 900  # pixels of a picture on the page at most
QUALITY = 75

DrawTiling = Callable[[Image.Image, Tiling], Image.Image]
"""Draws an image's tiles."""


@dataclass(frozen=True)
class Pictures:
    """Finds questions' pictures where results say, else by their file's name in `folder`."""

    folder: Path | None
    draw_tiling: DrawTiling

    def show(self, image: str, tiling: Tiling | None) -> tuple[str, str]:
        """A data URL, empty where there is no picture, and what is to be said about it."""
        if not image:
            return "", "which picture it is was not recorded"
        try:
            picture = open_image(self._find(image))
        except (DataError, OSError, ValueError) as error:
            return "", f"no picture: {error}"
        if tiling is None:
            return _data_url(picture), "tiles unknown: the result does not say how the model cuts pictures"
        return _data_url(self.draw_tiling(picture, tiling)), ""

    def _find(self, image: str) -> Path:
        path = Path(image)
        if self.folder is None:
            return path
        named = self.folder / path.name
        return named if named.is_file() else path


def png_url(png: bytes) -> str:
    """A PNG file as a data URL."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _data_url(picture: Image.Image) -> str:
    picture.thumbnail((WIDTH, 2 * WIDTH))
    content = BytesIO()
    picture.save(content, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
