"""Read captions and boxes of images from COCO, JSONL and Visual Genome files, one value in memory at a time."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import ijson

from anyres_vlm.data.blobs import open_file
from anyres_vlm.data.headers import read_size
from anyres_vlm.data.sources.paths import path_inside
from anyres_vlm.data.sources.record import BOM, parse_json
from anyres_vlm.errors import DataError
from anyres_vlm.geometry import Size

logger = logging.getLogger(__name__)

RECORD_KEYS = frozenset("id image_id image width height captions boxes instances regions".split())
SLACK = 0.01  # by which rounding may take a fraction beyond the image


class Box(NamedTuple):
    """A box as fractions of the image's sides, measured from its left and top."""

    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True, slots=True)
class Object:
    """A box and its content: a category, or a phrase that describes a region. A crowd is several objects in one box."""

    name: str
    box: Box
    crowd: bool = False


@dataclass(frozen=True, slots=True)
class Scene:
    """One image as it is described to a text-only model. `image` is the file name inside the image folder.

    Raises `UnicodeEncodeError` for a lone surrogate, which JSON can hold but no request can send.
    """

    id: str
    image: str
    captions: tuple[str, ...]
    objects: tuple[Object, ...]

    def __post_init__(self) -> None:
        "".join([self.id, self.image, *self.captions, *(item.name for item in self.objects)]).encode()

    def context(self, boxes: bool) -> str:
        """Return the description for the model: captions, then `name: [left, top, right, bottom]`, one per line."""
        lines = list(self.captions)
        if boxes and self.objects:
            lines += [""] * bool(lines)
            lines += [f"{item.name}: [{', '.join(f'{side:.3f}' for side in item.box)}]" for item in self.objects]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the form kept in the raw log."""
        objects = [[item.name, *item.box, item.crowd] for item in self.objects]
        return {"id": self.id, "image": self.image, "captions": list(self.captions), "objects": objects}

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Scene:
        """Restore what `to_json` returned."""
        objects = tuple(Object(name, Box(*sides), crowd) for name, *sides, crowd in entry["objects"])
        return cls(entry["id"], entry["image"], tuple(entry["captions"]), objects)


def image_size(entry: Mapping[str, Any], image: str, path: Path, folder: Path | None) -> Size:
    """Return the size of an image with boxes: as given in its record or, if absent or 0, from the image's header.

    Raises `DataError` if neither is available.
    """
    if entry.get("width") and entry.get("height"):
        return Size(height=int(entry["height"]), width=int(entry["width"]))
    if folder is None:
        raise DataError(f"{path}: record of {image} has boxes, but no width and height: add them, or give --images")
    return read_size(folder / image)


def box_in(size: Size, left: float, top: float, width: float, height: float) -> Box | None:
    """Convert a box from pixels to fractions of its image, clipped to the image; None if no area is left."""
    return clip(left / size.width, top / size.height, (left + width) / size.width, (top + height) / size.height)


def clip(*sides: float) -> Box | None:
    """Clip a box, left, top, right and bottom as fractions, to its image; None if no area is left."""
    box = Box(*(round(min(max(side, 0.0), 1.0), 4) for side in sides))
    return box if box.left < box.right and box.top < box.bottom else None


def clean_captions(captions: Iterable[str]) -> tuple[str, ...]:
    """Return each caption on one line, without repetitions."""
    return tuple(dict.fromkeys(text for caption in captions if (text := " ".join(caption.split()))))


Images = dict[int, dict[str, Any]]  # by id: file_name, height and width, as the file gives them


def read_coco(captions: Path, instances: Path | None, folder: Path | None = None) -> list[Scene]:
    """Return every image of the captions file that has a caption, with its boxes from the instances file, sorted by id.

    COCO's files have 90 to 450 MB, most of it segmentations, and are streamed. A size that is not in the file is read
    from the image in the folder. Raises `DataError` for a file that is missing, malformed or inconsistent.
    """
    images: Images = {}
    for entry in stream_json(captions, "images.item"):
        with entry_of(captions, "image", entry):
            known = {"file_name": text_of(entry["file_name"])} | {side: entry.get(side) for side in ("height", "width")}
            path_inside(folder or captions.parent, known["file_name"], f"{captions}: image {entry.get('id')}")
            if images.setdefault(int(entry["id"]), known) != known:
                raise DataError(f"{captions}: two images have the id {entry['id']}: ids must differ")
    texts: dict[int, list[str]] = {}
    for entry in stream_json(captions, "annotations.item"):
        with entry_of(captions, "annotation", entry):
            image, caption = int(entry["image_id"]), text_of(entry["caption"])
        if image not in images:
            raise DataError(
                f"{captions}: annotation {entry.get('id')} names image {image}, which the file does not list"
            )
        texts.setdefault(image, []).append(caption)
    if not texts:
        raise DataError(f"{captions}: no captions; expected COCO's captions file with 'images' and 'annotations'")
    objects = {} if instances is None else _read_objects(instances, images, captions, folder)
    scenes = []
    for image in sorted(texts):
        name = images[image]["file_name"]
        with entry_of(captions, "image", name):
            boxes = tuple(dict.fromkeys(objects.get(image, ())))  # an annotation given twice is one object
            scenes.append(Scene(str(image), name, clean_captions(texts[image]), boxes))
    return scenes


def _read_objects(path: Path, images: Images, captions: Path, folder: Path | None) -> dict[int, list[Object]]:
    """Return the boxes of each image; boxes of images that the captions file lacks are left out."""
    names: dict[int, str] = {}
    for entry in stream_json(path, "categories.item"):
        with entry_of(path, "category", entry):
            if names.setdefault(int(entry["id"]), name := text_of(entry["name"])) != name:
                raise DataError(f"{path}: two categories have the id {entry['id']}: ids must differ")
    sizes: dict[int, Size] = {}
    objects: dict[int, list[Object]] = {}
    seen = empty = 0
    for entry in stream_json(path, "annotations.item"):
        seen += 1
        with entry_of(path, "annotation", entry):
            image, category = int(entry["image_id"]), int(entry["category_id"])
            left, top, width, height = map(float, entry["bbox"])
        if image not in images:
            continue
        if image not in sizes:
            with entry_of(captions, "image", images[image]):
                sizes[image] = image_size(images[image], images[image]["file_name"], captions, folder)
        if category not in names:
            raise DataError(
                f"{path}: annotation {entry.get('id')} is of category {category}, which the file does not name"
            )
        box = box_in(sizes[image], left, top, width, height)
        if box is None:
            empty += 1
        else:
            objects.setdefault(image, []).append(Object(names[category], box, bool(entry.get("iscrowd"))))
    if not objects:
        raise DataError(f"{path}: none of its {seen} boxes lies in an image of the captions: give files of one split")
    if empty:
        logger.warning("%s: %d boxes without area are left out", path, empty)
    return objects


def read_descriptions(path: Path, images: Path | None) -> list[Scene]:
    """Return the scene of every record of a JSONL file or a JSON list that has a caption or a box.

    Records come in one of these forms; several can be combined:

        {"id": 7, "image": "7.jpg", "width": 640, "height": 480, "captions": ["A dog runs."],
         "boxes": [{"category": "dog", "box": [left, top, width, height]}]}
        {"id": 7, "image": "7.jpg", "captions": ["A dog runs."],
         "instances": [{"category": "dog", "bbox": [left, top, right, bottom]}]}
        {"id": 7, "regions": [{"phrase": "a brown dog", "x": 10, "y": 20, "width": 100, "height": 80}]}

    `boxes`, and the `regions` of Visual Genome, are in pixels; the `instances` of LLaVA's description files are
    fractions of the image. Without `image` the file is ID.jpg, as in Visual Genome; a missing size is read from the
    image's header. Records without captions and boxes, boxes without area and unknown keys are counted in warnings.
    Raises `DataError` for a malformed record, a repeated id, or a size that is needed and unknown.
    """
    scenes: dict[str, Scene] = {}
    unknown: Counter[str] = Counter()
    empty = 0
    for entry in stream_records(path):
        with entry_of(path, "record", entry):
            scene, without_area = _scene(entry, path, images)
            unknown.update(set(entry) - RECORD_KEYS)
            empty += without_area
        if scene.id in scenes:
            raise DataError(f"{path}: two records have the id {scene.id}: ids must differ")
        scenes[scene.id] = scene
    usable = [scene for scene in scenes.values() if scene.captions or scene.objects]
    if not usable:
        raise DataError(f"{path}: no record has captions, boxes or regions")
    if unknown:
        names = ", ".join(f"{name} ({count:,} records)" for name, count in sorted(unknown.items()))
        logger.warning("%s: unknown keys are ignored: %s; known are %s", path, names, ", ".join(sorted(RECORD_KEYS)))
    if empty:
        logger.warning("%s: %d boxes without area are left out", path, empty)
    if len(usable) < len(scenes):
        logger.warning("%s: %d records without captions and boxes are left out", path, len(scenes) - len(usable))
    return usable


def _scene(entry: dict[str, Any], path: Path, images: Path | None) -> tuple[Scene, int]:
    """Return the scene of a record and the number of its boxes without area."""
    number = entry["id"] if "id" in entry else entry["image_id"]
    name = str(number) if isinstance(number, int) else text_of(number)
    image = text_of(entry.get("image", f"{name}.jpg"))
    path_inside(images or path.parent, image, f"{path}: record {name}")
    in_pixels = [(text_of(item["category"]), item["box"]) for item in entry.get("boxes", [])]
    for region in entry.get("regions", []):
        in_pixels.append((text_of(region["phrase"]), [region[side] for side in ("x", "y", "width", "height")]))
    found: list[tuple[str, Box | None]] = []
    if in_pixels:
        size = image_size(entry, image, path, images)
        for what, sides in in_pixels:
            left, top, width, height = map(float, sides)
            found.append((what, box_in(size, left, top, width, height)))
    found += [(text_of(item["category"]), _fractions(item["bbox"])) for item in entry.get("instances", [])]
    crowd = "regions" in entry  # a region may contain several objects
    labelled = [(label, box) for what, box in found if (label := " ".join(what.split()))]
    objects = tuple(Object(label, box, crowd) for label, box in labelled if box is not None)
    captions = entry.get("captions", [])
    if not isinstance(captions, list):
        raise TypeError("captions must be a list of texts")
    scene = Scene(name, image, clean_captions(map(text_of, captions)), objects)
    return scene, len(labelled) - len(objects)


def _fractions(sides: Sequence[float]) -> Box | None:
    left, top, right, bottom = map(float, sides)
    if not all(-SLACK <= side <= 1 + SLACK for side in (left, top, right, bottom)):
        raise ValueError(f"bbox {list(sides)} of instances: expected left, top, right and bottom between 0 and 1")
    return clip(left, top, right, bottom)


FAULTS = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError)  # raised by malformed entries
PACKED = (b"\x1f\x8b", b"PK\x03\x04")  # gzip, zip
SHOWN = 120  # characters of a malformed entry in a message


def stream_json(path: Path, prefix: str) -> Iterator[Any]:
    """Yield the values at an ijson prefix of a JSON file. Raises `DataError` for a missing or malformed file."""
    return _stream(path, lambda stream: ijson.items(stream, prefix, use_float=True))


def stream_members(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the keys and values of one large JSON object. Raises `DataError` for a missing or malformed file."""
    return _stream(path, lambda stream: ijson.kvitems(stream, "", use_float=True))


def stream_records(path: Path) -> Iterator[Any]:
    """Yield the lines of a .jsonl file or the elements of a JSON list. Raises `DataError` for anything else."""
    if path.suffix.lower() != ".jsonl":
        yield from stream_json(path, "item")
        return
    with _open(path) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                where = f"{path} line {number}"
                yield parse_json(line, lambda position, where=where: f"{where} column {position + 1}")  # type: ignore[misc]


@contextmanager
def entry_of(path: Path, what: str, entry: Any) -> Iterator[None]:
    """Turn errors from reading a malformed entry into a `DataError` that shows the entry."""
    try:
        yield
    except DataError:
        raise
    except FAULTS as error:
        shown = repr(entry)
        shown = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."
        raise DataError(f"{path}: {what} {shown} is not as expected: {type(error).__name__} {error}") from None


def text_of(value: Any) -> str:
    """Return the value. Raises `TypeError` if it is not a string."""
    if not isinstance(value, str):
        raise TypeError(f"expected a text, got {value!r}")
    return value


def _open(path: Path) -> BufferedReader:
    """Open a file after its byte order mark. Raises `DataError` if it is missing or compressed."""
    stream = open_file(path, str(path))
    start = stream.peek()
    if start.startswith(PACKED):
        stream.close()
        raise DataError(f"{path}: a compressed file, expected JSON: decompress it first")
    stream.seek(len(BOM) if start.startswith(BOM) else 0)
    return stream


def _stream(path: Path, parse: Callable[[BufferedReader], Iterator[Any]]) -> Iterator[Any]:
    with _open(path) as stream:
        try:
            yield from parse(stream)
        except (ijson.JSONError, UnicodeDecodeError) as error:
            said = error.args[0] if error.args else ""
            text = said.decode(errors="replace") if isinstance(said, bytes) else str(error)
            raise DataError(f"{path}: malformed JSON: {' '.join(text.split())[:200]}") from None
