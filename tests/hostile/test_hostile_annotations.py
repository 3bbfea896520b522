"""Hostile JSON ends in one line or in counted rejects, and what lies outside the image folder is not read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from annotations import (
    BENCHMARKS,
    COCO,
    DEEP,
    DESCRIPTION,
    TARGETS,
    check_benchmark,
    check_coco,
    check_data,
    check_descriptions,
    good_record,
    index,
)
from images import bad_pictures, good_pictures, photo
from target import explore
from watch import watched

from anyres_vlm.data.sources import read_records
from anyres_vlm.errors import DataError
from anyres_vlm.evaluate.benchmarks.base import ImageFolders

OUTSIDE = [
    "../secret.png",
    "{root}/secret.png",
    "link.png",
    "folder/secret.png",
    "./../secret.png",
    "a/../../secret.png",
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Where a data file goes, `a.png` beside it and a picture outside, to which links lead."""
    folder = tmp_path / "data"
    folder.mkdir()
    photo().save(folder / "a.png")
    photo().save(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "folder").symlink_to(tmp_path)
    (folder / "inner.png").symlink_to("a.png")
    return folder / "data.json"


@pytest.mark.parametrize("name", OUTSIDE)
def test_images_outside_the_folder_are_rejects(data: Path, name: str) -> None:
    name = name.format(root=data.parent.parent)
    data.write_text(json.dumps([good_record(image=name), good_record(), good_record(image="inner.png")]))
    with watched(data.parent):
        assert index(data) == {"malformed_record": 1, "ok": 2}
    with pytest.raises(DataError, match=r"out of the image folder|outside the image folder"):
        read_records(data, None)
    with pytest.raises(DataError, match=r"out of the image folder|outside the image folder"):
        ImageFolders(data, data, data.parent, ()).find(name, "question 1")


def test_links_of_ones_own_are_followed_when_asked(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["link.png", "folder/secret.png", "../secret.png"]
    data.write_text(json.dumps([good_record(), *(good_record(id=name, image=name) for name in names)]))
    assert index(data) == {"malformed_record": 3, "ok": 1}
    monkeypatch.setenv("ANYRES_FOLLOW_LINKS", "1")
    assert index(data) == {"ok": 3, "malformed_record": 1}


def test_an_image_folder_may_itself_be_a_link(data: Path, tmp_path: Path) -> None:
    (tmp_path / "shown").symlink_to(data.parent)
    data.write_text(json.dumps([good_record(), good_record(image="inner.png")]))
    assert len(read_records(data, tmp_path / "shown")) == 2


@pytest.mark.parametrize(
    "name", ["", "a\0.png", "\ud800.png", "x" * 5000, "a.png/b", "~/a.png", "file:a.png", ".", "a.png ", 5, {}, [[]]]
)
def test_names_that_no_file_has_are_rejects(data: Path, name: Any) -> None:
    data.write_text(json.dumps([good_record(image=name), good_record()]))
    with watched(data.parent):
        assert index(data)["ok"] == 1


def test_a_folder_of_hostile_pictures_is_indexed(data: Path) -> None:
    pictures = {name: (True, content) for name, content in good_pictures().items()}
    pictures |= {name: (False, content) for name, content in bad_pictures().items()}
    rows = []
    for name, (_, content) in pictures.items():
        (data.parent / f"{name}.png").write_bytes(content)  # the ending says nothing
        rows.append(good_record(id=name, image=f"{name}.png"))
    data.write_text(json.dumps(rows))
    with watched(data.parent):
        counted = index(data)
    # an index reads headers: what is wrong behind them shows when it is decoded
    whole_heads = {"bomb", "bomb_grey", "cut_jpeg", "float"}
    assert counted.pop("ok") >= len(good_pictures())
    refused = len(bad_pictures()) - len(whole_heads)
    assert refused <= sum(counted.values()) <= len(bad_pictures())


def test_messages_stay_on_one_line(data: Path) -> None:
    data.write_text(json.dumps([good_record(id="a\r\u2028b\n", image=5)]))
    with pytest.raises(DataError) as caught:
        read_records(data, None)
    assert len(str(caught.value).splitlines()) == 1


def test_a_benchmark_may_name_no_picture(data: Path) -> None:
    assert ImageFolders(data, data, None, ()).find("x" * 5000, "question 1").path is not None


def nested(key: str, value: str) -> str:
    return json.dumps([good_record(**{key: "DEEP"}), good_record()]).replace('"DEEP"', value)


@pytest.mark.parametrize("key", ["id", "image", "conversations", "messages", "task", "unknown"])
@pytest.mark.parametrize(
    "value", [DEEP, "[" * 100_000 + "]" * 100_000, "NaN", "-Infinity", "1e999", "9" * 5000, '"\\ud800"', "{}", "[[]]"]
)
def test_odd_values_at_every_key(tmp_path: Path, key: str, value: str) -> None:
    with watched(tmp_path):
        assert check_data(nested(key, value).encode(), tmp_path), "the other record is good"


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_forms_of_a_file(tmp_path: Path, suffix: str) -> None:
    rows = [json.dumps(good_record(id="same"))] * 3
    text = "\n".join(rows) if suffix == ".jsonl" else f"[{','.join(rows)}]"
    twice = text.replace('"id": "same"', '"id": "other", "id": "same"')
    with watched(tmp_path):
        assert check_data(text.encode(), tmp_path, suffix), "ids may repeat: rows tell records apart"
        assert check_data(b"\xef\xbb\xbf" + twice.encode(), tmp_path, suffix)
        for content in (text.encode("utf-16"), b"\0" * 1000, b"\xff\xfe", b"[", b"", b"{}", b"null", b"[[[", b'["'):
            assert not check_data(content, tmp_path, suffix)
        for end in range(0, len(text), 7):
            check_data(text[:end].encode(), tmp_path, suffix)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("key", ["unknown", "image", "conversations"])
def test_a_line_of_100_mb(data: Path, suffix: str, key: str) -> None:
    long = "x " * 50_000_000
    said = [{"from": "human", "value": long}, {"from": "gpt", "value": "yes"}]
    rows = [json.dumps(good_record(**{key: said if key == "conversations" else long})), json.dumps(good_record())]
    del long, said
    file = data.with_suffix(suffix)
    file.write_text("\n".join(rows) if suffix == ".jsonl" else f"[{','.join(rows)}]")
    del rows
    with watched(data.parent):
        assert index(file) == {"malformed_record": 1, "ok": 1}


@pytest.mark.slow
def test_many_long_records(data: Path) -> None:
    said = [{"from": "human", "value": "x " * 500_000}, {"from": "gpt", "value": "yes"}]
    data.write_text(json.dumps([{"conversations": said}] * 6 + [good_record()]))
    with watched(data.parent):
        assert index(data) == {"too_long": 6, "ok": 1}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark_files(tmp_path: Path, name: str) -> None:
    good = json.dumps(BENCHMARKS[name][2])
    for number, value in enumerate([good, "[1]", '{"a": 1}', "9" * 5000, f"[{'9' * 5000}]", DEEP, '"x"', "NaN"]):
        (folder := tmp_path / str(number)).mkdir()
        with watched(folder):
            assert check_benchmark((name, value), folder) == (value == good)


@pytest.mark.parametrize("name", ["../a.png", "/a.png", "x" * 5000, "a\0.png"])
def test_descriptions_name_images_of_the_folder(tmp_path: Path, name: str) -> None:
    described = [DESCRIPTION[0] | {"image": name, "width": 0}]
    listed = COCO | {"images": [COCO["images"][0] | {"file_name": name, "width": 0}]}
    for check, good, odd in ((check_descriptions, DESCRIPTION, described), (check_coco, COCO, listed)):
        for content in (good, odd):
            (folder := tmp_path / f"{check.__name__}_{content is good}").mkdir()
            assert check(json.dumps(content), folder) == (content is good)


@pytest.mark.parametrize("name", TARGETS)
def test_odd_records(name: str) -> None:
    tally = explore(TARGETS[name], examples=60, fixed=True)
    assert not tally.faults, tally.faults
    assert tally.accepted
    assert tally.rejected
