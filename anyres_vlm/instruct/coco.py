"""COCO's captions and instances, streamed: the files are 90 to 450 MB, and segmentations are most of that."""

from __future__ import annotations

import logging
from pathlib import Path

from anyres_vlm.errors import DataError
from anyres_vlm.geometry import Size
from anyres_vlm.instruct.json_stream import entry_of, stream_json
from anyres_vlm.instruct.scene import Object, Scene, box_in, clean_captions

logger = logging.getLogger(__name__)


def read_coco(captions: Path, instances: Path | None) -> list[Scene]:
    """Every image of the captions file that has a caption, with the boxes of the instances file, in order of ids.

    Raises `DataError` for a file that is missing, malformed or contradicts itself.
    """
    images = {}
    for entry in stream_json(captions, "images.item"):
        with entry_of(captions, "image", entry):
            images[int(entry["id"])] = (str(entry["file_name"]), Size(height=entry["height"], width=entry["width"]))
    texts: dict[int, list[str]] = {}
    for entry in stream_json(captions, "annotations.item"):
        with entry_of(captions, "annotation", entry):
            image, caption = int(entry["image_id"]), str(entry["caption"])
        if image not in images:
            raise DataError(
                f"{captions}: annotation {entry.get('id')} names image {image}, which the file does not list"
            )
        texts.setdefault(image, []).append(caption)
    if not texts:
        raise DataError(f"{captions}: no captions; expected COCO's captions file with 'images' and 'annotations'")
    sizes = {image: size for image, (_, size) in images.items()}
    objects = {} if instances is None else _read_objects(instances, sizes)
    scenes = []
    for image in sorted(texts):
        with entry_of(captions, "image", images[image][0]):
            told = clean_captions(texts[image])
            scenes.append(Scene(str(image), images[image][0], told, tuple(objects.get(image, ()))))
    return scenes


def _read_objects(path: Path, sizes: dict[int, Size]) -> dict[int, list[Object]]:
    """The boxes of each image; those of other images are left out, as of another split's file."""
    names: dict[int, str] = {}
    for entry in stream_json(path, "categories.item"):
        with entry_of(path, "category", entry):
            names[int(entry["id"])] = str(entry["name"])
    objects: dict[int, list[Object]] = {}
    seen = empty = 0
    for entry in stream_json(path, "annotations.item"):
        seen += 1
        with entry_of(path, "annotation", entry):
            image, category = int(entry["image_id"]), int(entry["category_id"])
            left, top, width, height = map(float, entry["bbox"])
            if image not in sizes:
                continue
            box = box_in(sizes[image], left, top, width, height)
        if category not in names:
            raise DataError(
                f"{path}: annotation {entry.get('id')} is of category {category}, which the file does not name"
            )
        if box is None:
            empty += 1
        else:
            objects.setdefault(image, []).append(Object(names[category], box, bool(entry.get("iscrowd"))))
    if not objects:
        raise DataError(f"{path}: none of its {seen} boxes lies in an image of the captions: give files of one split")
    if empty:
        logger.warning("%s: %d boxes without area are left out", path, empty)
    return objects
