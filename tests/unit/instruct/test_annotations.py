"""COCO, JSONL and Visual Genome files as scenes."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from anyres_vlm.errors import DataError
from anyres_vlm.instruct.annotations import Box, Object, Scene, read_coco, read_descriptions

IMAGES = [
    {"id": 9, "file_name": "b.jpg", "height": 100, "width": 200},
    {"id": 4, "file_name": "a.jpg", "height": 50, "width": 50},
    {"id": 5, "file_name": "untold.jpg", "height": 50, "width": 50},
]
CAPTIONS = [
    {"id": 1, "image_id": 9, "caption": "A dog\n runs. "},
    {"id": 2, "image_id": 9, "caption": "A dog runs."},
    {"id": 3, "image_id": 4, "caption": "A cat."},
]
CATEGORIES = [{"id": 18, "name": "dog"}, {"id": 17, "name": "cat"}]
BOXES = [
    {"image_id": 9, "category_id": 18, "bbox": [20, 10, 100, 50], "iscrowd": 0, "segmentation": [[1.0] * 9]},
    {"image_id": 9, "category_id": 17, "bbox": [150, 50, 100, 100], "iscrowd": 1},  # beyond the image
    {"image_id": 9, "category_id": 17, "bbox": [5, 5, 0, 7], "iscrowd": 0},  # without area
    {"image_id": 77, "category_id": 17, "bbox": [5, 5, 7, 7], "iscrowd": 0},  # of another split
]


def write(folder: Path, **changes: Any) -> tuple[Path, Path]:
    content = {"images": IMAGES, "captions": CAPTIONS, "boxes": BOXES, "categories": CATEGORIES} | changes
    captions, instances = folder / "captions.json", folder / "instances.json"
    captions.write_text(json.dumps({"images": content["images"], "annotations": content["captions"]}))
    # as in the real file, the categories come last
    instances.write_text(json.dumps({"annotations": content["boxes"], "categories": content["categories"]}))
    return captions, instances


def test_coco_is_joined(tmp_path: Path) -> None:
    objects = (Object("dog", Box(0.1, 0.1, 0.6, 0.6)), Object("cat", Box(0.75, 0.5, 1.0, 1.0), crowd=True))
    expected = [Scene("4", "a.jpg", ("A cat.",), ()), Scene("9", "b.jpg", ("A dog runs.",), objects)]
    assert read_coco(*write(tmp_path)) == expected
    assert [scene.objects for scene in read_coco(tmp_path / "captions.json", None)] == [(), ()]
    assert [Scene.from_json(json.loads(json.dumps(scene.to_json()))) for scene in expected] == expected


def test_the_context() -> None:
    scene = Scene("1", "1.jpg", ("One.", "Two."), (Object("dog", Box(0.1, 0.25, 0.6, 1.0)),))
    assert scene.context(boxes=True) == "One.\nTwo.\n\ndog: [0.100, 0.250, 0.600, 1.000]"
    assert scene.context(boxes=False) == "One.\nTwo."


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"captions": [{"id": 7, "image_id": 1, "caption": "x"}]},
            "annotation 7 names image 1, which the file does not",
        ),
        ({"captions": [{"id": 7, "image_id": 9}]}, "KeyError 'caption'"),
        ({"captions": []}, "no captions; expected COCO's captions file"),
        (
            {"images": [{"id": 9, "height": 3, "width": 3}]},
            "image {'id': 9, 'height': 3, 'width': 3} is not as expected",
        ),
        ({"images": [{**IMAGES[0], "width": 0}, *IMAGES[1:]]}, "b.jpg has boxes, but no width and height: add them"),
        ({"images": [{**IMAGES[0], "width": -2}, *IMAGES[1:]]}, "image size -2x100"),
        ({"images": [*IMAGES, {**IMAGES[0], "file_name": "z.jpg"}]}, "two images have the id 9"),
        ({"captions": [{"id": 7, "image_id": 9, "caption": None}]}, "expected a text, got None"),
        ({"categories": [*CATEGORIES, {"id": 17, "name": "cow"}]}, "two categories have the id 17"),
        ({"categories": CATEGORIES[:1]}, "is of category 17, which the file does not name"),
        ({"boxes": BOXES[3:]}, "none of its 1 boxes lies in an image of the captions"),
        ({"boxes": [{**BOXES[0], "bbox": [1, 2]}]}, "not enough values to unpack"),
    ],
)
def test_broken_coco(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as caught:
        read_coco(*write(tmp_path, **changes))
    assert said in str(caught.value)


def test_what_two_tools_may_write_differently_is_read_alike(tmp_path: Path) -> None:
    scenes = read_coco(*write(tmp_path))
    captions, instances = tmp_path / "captions.json", tmp_path / "instances.json"
    crowd = {"size": [100, 200], "counts": "abc01"}  # run lengths, as of COCO's crowds
    boxes = [{**box, "segmentation": crowd, "image_id": float(box["image_id"])} for box in BOXES]  # type: ignore[arg-type]
    write(tmp_path, images=IMAGES * 2, boxes=boxes * 2)  # with all images and boxes twice
    captions.write_bytes(b"\xef\xbb\xbf" + captions.read_bytes())  # a byte order mark
    assert read_coco(captions, instances) == scenes


def test_sizes_that_coco_does_not_give_are_in_the_images(tmp_path: Path) -> None:
    scenes = read_coco(*write(tmp_path))
    captions, instances = write(tmp_path, images=[{"id": 9, "file_name": "b.jpg"}, {**IMAGES[1], "height": 0}])
    Image.new("RGB", (200, 100)).save(tmp_path / "b.jpg")  # a.jpg has no box, and is not looked at
    assert read_coco(captions, instances, tmp_path) == scenes
    with pytest.raises(DataError, match=r"b\.jpg: no such file"):
        read_coco(captions, instances, tmp_path / "elsewhere")


@pytest.mark.parametrize("pack", [gzip.compress, lambda content: b"PK\x03\x04" + content])
def test_a_packed_file_is_named(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    captions, _ = write(tmp_path)
    captions.write_bytes(pack(captions.read_bytes()))
    with pytest.raises(DataError, match=r"captions\.json: a compressed file, expected JSON: decompress it first"):
        read_coco(captions, None)


def test_a_cut_file_is_named(tmp_path: Path) -> None:
    captions, _ = write(tmp_path)
    captions.write_bytes(captions.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"captions\.json: malformed JSON"):
        read_coco(captions, None)


def test_jsonl_and_visual_genome_sizes_from_the_file_or_the_image(tmp_path: Path) -> None:
    Image.new("RGB", (40, 20)).save(tmp_path / "2.jpg")
    lines = [
        {"id": 1, "image": "x.png", "width": 10, "height": 10, "boxes": [{"category": "cup", "box": [1, 2, 3, 4]}]},
        {"id": 3, "captions": ["Only told."]},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    cup, told = read_descriptions(tmp_path / "a.jsonl", None)
    assert cup == Scene("1", "x.png", (), (Object("cup", Box(0.1, 0.2, 0.4, 0.6)),))
    assert told == Scene("3", "3.jpg", ("Only told.",), ())
    region = {"region_id": 8, "x": 10, "y": 5, "width": 20, "height": 10, "phrase": "a \n red cup", "image_id": 2}
    (tmp_path / "regions.json").write_text(json.dumps([{"id": 2, "regions": [region]}]))
    (scene,) = read_descriptions(tmp_path / "regions.json", tmp_path)
    assert scene == Scene("2", "2.jpg", (), (Object("a red cup", Box(0.25, 0.25, 0.75, 0.75), crowd=True),))
    with pytest.raises(DataError, match=r"record of 2\.jpg has boxes, but no width and height"):
        read_descriptions(tmp_path / "regions.json", None)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (['{"id": 1, "captions": ["a"]}', "{broken"], "line 2 column 2: malformed JSON"),
        (['{"id": 1, "captions": ["a"]}'] * 2, "two records have the id 1"),
        (['{"id": 1, "captions": "a"}'], "captions must be a list of texts"),
        (['{"id": 1, "captions": ["a \\ud800"]}'], "surrogates not allowed"),
        (["[1]"], "record [1] is not as expected"),
        (['{"id": 1}'], "no record has captions, boxes or regions"),
        (['{"captions": ["a"]}'], "KeyError 'image_id'"),
        (['{"id": null, "captions": ["a"]}'], "expected a text, got None"),
        (['{"id": 1, "image": 7, "captions": ["a"]}'], "expected a text, got 7"),
        (['{"id": 1, "captions": [["a"]]}'], "expected a text, got ['a']"),
        (['{"id": 1, "width": 9, "height": 9, "boxes": [{"category": 3, "box": [1, 1, 1, 1]}]}'], "a text, got 3"),
    ],
)
def test_broken_descriptions(tmp_path: Path, lines: list[str], said: str) -> None:
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        read_descriptions(tmp_path / "d.jsonl", None)
    assert said in str(caught.value)


@pytest.mark.slow
def test_files_of_real_size_stay_under_two_gigabytes(tmp_path: Path) -> None:
    """118,287 images, 590,000 captions and 860,000 boxes with outlines: 90 and 450 MB, as train2017."""
    with (tmp_path / "c.json").open("w") as captions, (tmp_path / "i.json").open("w") as instances:
        captions.write('{"images": [')
        image = '{{"id": {0}, "file_name": "{0:012d}.jpg", "height": 480, "width": 640, "url": "{1}"}}'
        captions.write(",".join(image.format(number, "x" * 120) for number in range(118_287)))
        captions.write('], "annotations": [')
        caption = '{{"id": {0}, "image_id": {1}, "caption": "A dog number {0} runs over a meadow to its ball."}}'
        captions.write(",".join(caption.format(number, number // 5) for number in range(590_000)))
        captions.write("]}")
        instances.write('{"annotations": [')
        for number in range(860_000):
            outline = ",".join(["123.45"] * 56)
            instances.write("," * bool(number) + f'{{"id": {number}, "image_id": {number % 118_287}, "category_id": 1,')
            instances.write(f'"bbox": [1.5, 2.5, 30.25, 40.75], "iscrowd": 0, "segmentation": [[{outline}]]}}')
        instances.write('], "categories": [{"id": 1, "name": "dog"}]}')
    script = (
        "import resource; from pathlib import Path; from anyres_vlm.instruct.annotations import read_coco;"
        f"scenes = read_coco(Path({str(tmp_path / 'c.json')!r}), Path({str(tmp_path / 'i.json')!r}));"
        "print(len(scenes), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    scenes, peak_kb = map(int, done.stdout.split())
    assert scenes == 118_000
    assert peak_kb < 1_500_000


def describe(folder: Path, *records: dict[str, Any]) -> Path:
    path = folder / "descriptions.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_boxes_of_llava_s_description_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Fractions of the image as corners under `instances`; no size is needed."""
    boxes = [
        {"category": "dog", "bbox": [0.1, 0.25, 0.6, 1.0]},
        {"category": "cat", "bbox": [0.5, 0.5, 1.004, 0.75]},  # rounded up
        {"category": "cup", "bbox": [0.5, 0.5, 0.5, 0.75]},  # without area
    ]
    record = {"id": "441147", "image": "COCO_val2014_000000441147.jpg", "captions": ["A dog."], "instances": boxes}
    (scene,) = read_descriptions(describe(tmp_path, record), None)
    assert scene.image == record["image"]
    assert scene.objects == (Object("dog", Box(0.1, 0.25, 0.6, 1.0)), Object("cat", Box(0.5, 0.5, 1.0, 0.75)))
    assert "1 boxes without area are left out" in caplog.text
    both = record | {"width": 10, "height": 10, "boxes": [{"category": "pig", "box": [0, 0, 5, 10]}]}
    (scene,) = read_descriptions(describe(tmp_path, both), None)
    assert [item.name for item in scene.objects] == ["pig", "dog", "cat"]
    assert scene.objects[0].box == Box(0, 0, 0.5, 1)


@pytest.mark.parametrize("bbox", [[10, 20, 110, 70], [0.1, 0.1, 0.2], [-0.5, 0, 1, 1], ["a", 0, 1, 1]])
def test_instances_that_are_not_fractions(tmp_path: Path, bbox: list[Any]) -> None:
    path = describe(tmp_path, {"id": 1, "instances": [{"category": "dog", "bbox": bbox}]})
    with pytest.raises(DataError, match=r"descriptions\.jsonl: record .* is not as expected: ValueError"):
        read_descriptions(path, None)


def test_what_is_ignored_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = [
        {"id": 1, "captions": ["A dog."], "segments": [], "licence": 3},
        {"id": 2, "caption": "A cat.", "licence": 3},
        {"id": 3, "captions": []},
    ]
    assert [scene.id for scene in read_descriptions(describe(tmp_path, *records), None)] == ["1"]
    lines = [record.message for record in caplog.records]
    assert "unknown keys are ignored: caption (1 records), licence (2 records), segments (1 records); known" in lines[0]
    assert lines[1].endswith("2 records without captions and boxes are left out")
    caplog.clear()
    read_descriptions(describe(tmp_path, {"id": 1, "captions": ["A dog."]}), None)
    assert caplog.text == ""
