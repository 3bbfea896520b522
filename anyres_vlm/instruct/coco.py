"""COCO's captions and instances, streamed: the files are 90 to 450 MB, and segmentations are most of that."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from anyres_vlm.data.sources.paths import path_inside
from anyres_vlm.errors import DataError
from anyres_vlm.geometry import Size
from anyres_vlm.instruct.json_stream import entry_of, stream_json, text_of
from anyres_vlm.instruct.scene import Object, Scene, box_in, clean_captions, image_size

logger = logging.getLogger(__name__)

Images = dict[int, dict[str, Any]]  # by id: file_name, height and width, as the file gives them


def read_coco(captions: Path, instances: Path | None, folder: Path | None = None) -> list[Scene]:
    """Every image of the captions file that has a caption, with the boxes of the instances file, in order of ids.

    A size that the file does not give is read from the image in the folder. Raises `DataError` for a file that is
    missing, malformed or contradicts itself.
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
            # an annotation that the file has twice is one object
            boxes = tuple(dict.fromkeys(objects.get(image, ())))
            scenes.append(Scene(str(image), name, clean_captions(texts[image]), boxes))
    return scenes


def _read_objects(path: Path, images: Images, captions: Path, folder: Path | None) -> dict[int, list[Object]]:
    """The boxes of each image; those of other images are left out, as of another split's file."""
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
