"""What is known about an image without seeing it: captions, and boxes with names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from anyres_vlm.data.headers import read_size
from anyres_vlm.errors import DataError
from anyres_vlm.geometry import Size


class Box(NamedTuple):
    """Sides as shares of the image, from its left and top."""

    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True, slots=True)
class Object:
    """A box and what is in it: a category, or the phrase that describes a region. A crowd is several in one box."""

    name: str
    box: Box
    crowd: bool = False


@dataclass(frozen=True, slots=True)
class Scene:
    """One image as a text-only model is told of it. `image` is the file's name inside the image folder.

    Raises `UnicodeEncodeError` for half a character (a lone surrogate), which JSON can hold and no request takes.
    """

    id: str
    image: str
    captions: tuple[str, ...]
    objects: tuple[Object, ...]

    def __post_init__(self) -> None:
        "".join([self.id, self.image, *self.captions, *(item.name for item in self.objects)]).encode()

    def context(self, boxes: bool) -> str:
        """What the model is given: a caption a line, then `name: [left, top, right, bottom]` a line."""
        lines = list(self.captions)
        if boxes and self.objects:
            lines += [""] * bool(lines)
            lines += [f"{item.name}: [{', '.join(f'{side:.3f}' for side in item.box)}]" for item in self.objects]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """As the raw log keeps it."""
        objects = [[item.name, *item.box, item.crowd] for item in self.objects]
        return {"id": self.id, "image": self.image, "captions": list(self.captions), "objects": objects}

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Scene:
        """What `to_json` wrote."""
        objects = tuple(Object(name, Box(*sides), crowd) for name, *sides, crowd in entry["objects"])
        return cls(entry["id"], entry["image"], tuple(entry["captions"]), objects)


def image_size(entry: Mapping[str, Any], image: str, path: Path, folder: Path | None) -> Size:
    """What a file says of an image that has boxes or, where it says nothing or 0, the image's header.

    Raises `DataError` where neither tells.
    """
    if entry.get("width") and entry.get("height"):
        return Size(height=int(entry["height"]), width=int(entry["width"]))
    if folder is None:
        raise DataError(f"{path}: record of {image} has boxes, but no width and height: add them, or give --images")
    return read_size(folder / image)


def box_in(size: Size, left: float, top: float, width: float, height: float) -> Box | None:
    """A box in pixels as shares of its image, cut at the image's sides; None where nothing is left of it."""
    sides = Box(left / size.width, top / size.height, (left + width) / size.width, (top + height) / size.height)
    box = Box(*(round(min(max(side, 0.0), 1.0), 4) for side in sides))
    return box if box.left < box.right and box.top < box.bottom else None


def clean_captions(captions: Iterable[str]) -> tuple[str, ...]:
    """Each on one line, without repetitions."""
    return tuple(dict.fromkeys(text for caption in captions if (text := " ".join(caption.split()))))
