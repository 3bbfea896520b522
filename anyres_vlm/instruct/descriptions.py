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

from anyres_vlm.data.sources.paths import path_inside
from anyres_vlm.errors import DataError
from anyres_vlm.instruct.json_stream import entry_of, stream_records, text_of
from anyres_vlm.instruct.scene import Object, Scene, box_in, clean_captions, image_size

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
    number = entry["id"] if "id" in entry else entry["image_id"]
    name = str(number) if isinstance(number, int) else text_of(number)
    image = text_of(entry.get("image", f"{name}.jpg"))
    path_inside(images or path.parent, image, f"{path}: record {name}")
    found = [(text_of(item["category"]), item["box"]) for item in entry.get("boxes", [])]
    for region in entry.get("regions", []):
        found.append((text_of(region["phrase"]), [region[side] for side in ("x", "y", "width", "height")]))
    objects = []
    if found:
        size = image_size(entry, image, path, images)
        crowd = "regions" in entry  # a region may hold several
        for what, sides in found:
            left, top, width, height = map(float, sides)
            box = box_in(size, left, top, width, height)
            if box is not None and (told := " ".join(what.split())):
                objects.append(Object(told, box, crowd))
    captions = entry.get("captions", [])
    if not isinstance(captions, list):
        raise TypeError("captions must be a list of texts")
    return Scene(name, image, clean_captions(map(text_of, captions)), tuple(objects))
