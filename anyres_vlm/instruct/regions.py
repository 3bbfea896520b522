"""Regions and the phrases that describe them, both ways: RefCOCO and Visual Genome.

A box is written as LLaVA-1.5 writes it, left, top, right, bottom with two decimals, as shares of the image's own sides:
an AnyRes thumbnail holds the whole image, where LLaVA-1.5 padded it to a square first.
"""

from __future__ import annotations

import io
import json
import pickle
import random
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from anyres_vlm.data.blobs import read_blob
from anyres_vlm.errors import DataError
from anyres_vlm.geometry import Size
from anyres_vlm.instruct.academic import COCO_2014, Conversation, Pair, conversation
from anyres_vlm.instruct.descriptions import read_descriptions
from anyres_vlm.instruct.json_stream import entry_of, stream_json
from anyres_vlm.instruct.scene import Box, box_in

DESCRIBE = "Please provide a short description for this region: {}."
LOCATE = "Please provide the bounding box coordinate of the region this sentence describes: {}."
LONGEST = 9  # regions of one conversation; LLaVA-1.5 cuts RefCOCO's at fewer than ten turns
OF_A_GENOME = 10  # regions drawn of each Visual Genome image, as in LLaVA-1.5

Region = tuple[str, Box]


def read_refcoco(refs: Path, instances: Path | None, image_name: str | None, seed: int) -> Iterator[Conversation]:
    """The training split of RefCOCO, RefCOCO+ or RefCOCOg: a `refs(...).p` or the same as JSON, and `instances.json`.

    Raises `DataError` where the files do not belong together.
    """
    if instances is None:
        raise DataError(f"{refs}: RefCOCO's references have no boxes: give its instances.json as annotations")
    sizes: dict[int, Size] = {}
    for entry in stream_json(instances, "images.item"):
        with entry_of(instances, "image", entry):
            sizes[int(entry["id"])] = Size(height=int(entry["height"]), width=int(entry["width"]))
    boxes: dict[int, Box | None] = {}
    for entry in stream_json(instances, "annotations.item"):
        with entry_of(instances, "annotation", entry):
            left, top, width, height = map(float, entry["bbox"])
            boxes[int(entry["id"])] = box_in(sizes[int(entry["image_id"])], left, top, width, height)
    images: dict[int, list[Region]] = {}
    for entry in _read_refs(refs):
        with entry_of(refs, "reference", entry):
            if entry["split"] != "train":
                continue
            box, image = boxes[int(entry["ann_id"])], int(entry["image_id"])
            if box is not None:
                images.setdefault(image, []).extend((str(said["sent"]), box) for said in entry["sentences"])
    for image, regions in images.items():
        yield from _both_ways((image_name or COCO_2014).format(image), regions, seed)


def read_genome(regions: Path, images: Path | None, seed: int) -> Iterator[Conversation]:
    """Visual Genome's region descriptions, up to ten of an image."""
    for scene in read_descriptions(regions, images):
        found = [(item.name, item.box) for item in scene.objects]
        chance = random.Random(f"{seed} {scene.image}")
        yield from _both_ways(scene.image, chance.sample(found, min(len(found), OF_A_GENOME)), seed)


def _both_ways(image: str, regions: Sequence[Region], seed: int) -> Iterator[Conversation]:
    """Conversations about one image, each region described or located at random."""
    chance = random.Random(f"{seed} {image} ways")
    for start in range(0, len(regions), LONGEST):
        pairs: list[Pair] = []
        for phrase, box in regions[start : start + LONGEST]:
            said = phrase.strip().rstrip(".")
            place = f"[{', '.join(f'{side:.2f}' for side in box)}]"
            describe = chance.random() < 0.5
            pairs.append((DESCRIBE.format(place), said) if describe else (LOCATE.format(said), place))
        yield conversation(f"{PurePosixPath(image).stem}-{start // LONGEST}", image, pairs)


def _read_refs(path: Path) -> list[Any]:
    content = read_blob(path)
    try:
        found = json.loads(content) if path.suffix == ".json" else _Plain(io.BytesIO(content), encoding="latin1").load()
    except (pickle.UnpicklingError, ValueError, EOFError, IndexError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{path}: cannot be read as RefCOCO's references: {error}") from None
    if not isinstance(found, list):
        raise DataError(f"{path}: expected a list of references, got {type(found).__name__}")
    return found


class _Plain(pickle.Unpickler):
    """Reads lists, dictionaries, numbers and texts, and nothing that could run code."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """Raises `UnpicklingError`: RefCOCO's files name no class."""
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, which plain data does not")
