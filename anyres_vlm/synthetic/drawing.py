"""Drawing with exact marks: text whose every glyph's box is known, and anti-aliased shapes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from anyres_vlm.errors import UsageError
from anyres_vlm.synthetic.words import RGB

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels
Ink = tuple[int, int, int]

FACES = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
)
OVERSAMPLING = 4  # shapes are drawn this much larger and reduced, for smooth edges


@dataclass(frozen=True, slots=True)
class GlyphMark:
    """One visible character and its box."""

    char: str
    box: Box


@dataclass(frozen=True, slots=True)
class ObjectMark:
    """One drawn object and its box."""

    colour: str
    shape: str
    box: Box

    @property
    def centre(self) -> tuple[float, float]:
        """(y, x) in pixels."""
        return (self.box[1] + self.box[3]) / 2, (self.box[0] + self.box[2]) / 2


@dataclass
class Sheet:
    """A picture in the making, with the marks of what is on it."""

    height: int
    width: int
    background: Ink
    glyphs: list[GlyphMark] = field(default_factory=list)
    objects: list[ObjectMark] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.image = Image.new("RGB", (self.width, self.height), self.background)
        self.pen = ImageDraw.Draw(self.image)

    def text(self, left: float, baseline: float, text: str, face: str, size: int, ink: Ink) -> None:
        """Write one line, character by character, so that each one's place is known."""
        shape = font(face, size)
        for char in text:
            advance = shape.getlength(char)
            if char != " ":
                self.pen.text((left, baseline), char, font=shape, fill=ink, anchor="ls")
                top, bottom = shape.getbbox(char, anchor="ls")[1::2]
                self.glyphs.append(GlyphMark(char, (left, baseline + top, left + advance, baseline + bottom)))
            left += advance

    def is_free(self, left: int, top: int, side: int) -> bool:
        """Whether a square is at least three pixels away from every object."""
        return all(
            left > mark.box[2] + 3
            or left + side + 3 < mark.box[0]
            or top > mark.box[3] + 3
            or top + side + 3 < mark.box[1]
            for mark in self.objects
        )

    def object(self, colour: str, shape: str, left: int, top: int, side: int) -> None:
        """Draw an object into a square."""
        self.image.paste(RGB[colour], (left, top), _shape_mask(shape, side))
        self.objects.append(ObjectMark(colour, shape, (left, top, left + side, top + side)))


@lru_cache(maxsize=256)
def font(face: str, size: int) -> ImageFont.FreeTypeFont:
    """A DejaVu face (free licence), out of the fonts that matplotlib ships."""
    found = find_spec("matplotlib")
    if found is None or found.origin is None:
        raise UsageError("rendering needs the fonts that matplotlib ships: pip install 'anyres-vlm[demo]'")
    return ImageFont.truetype(str(Path(found.origin).parent / "mpl-data" / "fonts" / "ttf" / f"{face}.ttf"), size)


def text_width(text: str, face: str, size: int) -> float:
    """Width of one line in pixels."""
    return sum(font(face, size).getlength(char) for char in text)


def fitting_size(lines: list[str], face: str, width: float, largest: int, smallest: int) -> int:
    """The largest font size at which every line fits the width."""
    widest = max(text_width(line, face, 100) for line in lines)
    return max(min(largest, int(100 * width / widest)), smallest)


@lru_cache(maxsize=1024)
def _shape_mask(shape: str, side: int) -> Image.Image:
    large = side * OVERSAMPLING
    mask = Image.new("L", (large, large), 0)
    pen, end = ImageDraw.Draw(mask), large - 1
    if shape == "circle":
        pen.ellipse((0, 0, end, end), fill=255)
    elif shape == "ring":
        pen.ellipse((0, 0, end, end), fill=255)
        pen.ellipse((large * 0.27, large * 0.27, large * 0.73, large * 0.73), fill=0)
    elif shape == "square":
        pen.rectangle((large * 0.06, large * 0.06, large * 0.94, large * 0.94), fill=255)
    elif shape == "cross":
        pen.rectangle((large * 0.33, 0, large * 0.67, end), fill=255)
        pen.rectangle((0, large * 0.33, end, large * 0.67), fill=255)
    elif shape == "heart":
        pen.ellipse((0, large * 0.04, large * 0.54, large * 0.58), fill=255)
        pen.ellipse((large * 0.46, large * 0.04, end, large * 0.58), fill=255)
        pen.polygon([(large * 0.04, large * 0.44), (large * 0.96, large * 0.44), (large / 2, end)], fill=255)
    else:
        pen.polygon([(x * large, y * large) for x, y in _corners(shape)], fill=255)
    return mask.resize((side, side), Image.Resampling.LANCZOS)


def _corners(shape: str) -> list[tuple[float, float]]:
    if shape == "triangle":
        return [(0.5, 0.02), (1.0, 0.96), (0.0, 0.96)]
    if shape == "diamond":
        return [(0.5, 0.0), (0.86, 0.5), (0.5, 1.0), (0.14, 0.5)]
    assert shape == "star"
    points = []
    for corner in range(10):
        radius = 0.5 if corner % 2 == 0 else 0.21
        angle = math.pi * (corner / 5 - 0.5)
        points.append((0.5 + radius * math.cos(angle), 0.52 + radius * math.sin(angle)))
    return points
