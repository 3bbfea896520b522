"""Other descriptions of images: captions and boxes as JSONL, or Visual Genome's regions.

    {"id": 7, "image": "7.jpg", "width": 640, "height": 480, "captions": ["A dog runs."],
     "boxes": [{"category": "dog", "box": [left, top, width, height]}]}
    {"id": 7, "regions": [{"phrase": "a brown dog", "x": 10, "y": 20, "width": 100, "height": 80}]}

Sides are in pixels. A record that names no image means `ID.jpg`, as Visual Genome's; a size that is not given is read
from the image's header.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from anyres_vlm.data.headers import read_size
from anyres_vlm.errors import DataError
from anyres_vlm.geometry import Size
from anyres_vlm.instruct.json_stream import entry_of, stream_records
from anyres_vlm.instruct.scene import Object, Scene, box_in, clean_captions

logger = logging.getLogger(__name__)


def read_descriptions(path: Path, images: Path | None) -> list[Scene]:
    """Every record that has a caption or a box, a JSONL file's lines or a JSON list's elements.

    Raises `DataError` for a malformed record, a repeated id and a size that is neither written nor in a header.
    """
    scenes: dict[str, Scene] = {}
    for entry in stream_records(path):
        with entry_of(path, "record", entry):
            scene = _scene(entry, path, images)
        if scene.id in scenes:
            raise DataError(f"{path}: two records have the id {scene.id}: ids must differ")
        scenes[scene.id] = scene
    told = [scene for scene in scenes.values() if scene.captions or scene.objects]
    if not told:
        raise DataError(f"{path}: no record has captions, boxes or regions")
    if len(told) < len(scenes):
        logger.warning("%s: %d records without captions and boxes are left out", path, len(scenes) - len(told))
    return told


def _scene(entry: dict[str, Any], path: Path, images: Path | None) -> Scene:
    name = str(entry["id"] if "id" in entry else entry["image_id"])
    image = str(entry["image"]) if "image" in entry else f"{name}.jpg"
    found = [(str(item["category"]), item["box"]) for item in entry.get("boxes", [])]
    for region in entry.get("regions", []):
        phrase = " ".join(str(region["phrase"]).split())
        found.append((phrase, [region[side] for side in ("x", "y", "width", "height")]))
    objects = []
    if found:
        size = _size(entry, image, path, images)
        crowd = "regions" in entry  # a region may hold several
        for what, sides in found:
            left, top, width, height = map(float, sides)
            if box := box_in(size, left, top, width, height):
                objects.append(Object(what, box, crowd))
    captions = entry.get("captions", [])
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise TypeError("captions must be a list of texts")
    return Scene(name, image, clean_captions(captions), tuple(objects))


def _size(entry: dict[str, Any], image: str, path: Path, images: Path | None) -> Size:
    if "width" in entry and "height" in entry:
        return Size(height=int(entry["height"]), width=int(entry["width"]))
    if images is None:
        raise DataError(f"{path}: record of {image} has boxes, but no width and height: add them, or give --images")
    return read_size(images / image)
