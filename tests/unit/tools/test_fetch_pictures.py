"""The LLaVA folder made from tiny packages: images, records, the split, what is refused."""

import json
import sys
from pathlib import Path

import pictures
import pytest
from packages import Package
from pictures import (
    Picture,
    Source,
    caption_record,
    emoji,
    flatten,
    heldout_ids,
    instruct_record,
    photographs,
    save_images,
    stamps,
)
from PIL import Image

from anyres_vlm.errors import DataError, UsageError


def picture(name: str, caption: str = "A frog.") -> Picture:
    return Picture(name, Path("unused"), caption)


def write_image(file: Path, colour: str, size: tuple[int, int] = (30, 30)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGBA", size, colour).save(file)


def test_transparency_becomes_white_and_colour_stays() -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    assert [flatten(image).getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (255, 255, 255)]


@pytest.mark.parametrize(
    ("size", "expected"), [((2048, 1024), (512, 256)), ((100, 513), (100, 512)), ((40, 30), (40, 30))]
)
def test_long_side_is_at_most_512_and_nothing_grows(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert flatten(Image.new("P", size)).size == expected


def test_tiny_and_repeated_pictures_are_left_out(tmp_path: Path) -> None:
    pictures = []
    for name, colour, size in [
        ("first", "red", (30, 30)),
        ("same", "red", (30, 30)),
        ("other", "red", (30, 31)),
        ("tiny", "blue", (90, 23)),
    ]:
        write_image(tmp_path / f"{name}.webp", colour, size)
        pictures.append(Picture(name, tmp_path / f"{name}.webp", "A square."))
    out = tmp_path / "images"
    out.mkdir()
    assert [kept.id for kept in save_images(pictures, out)] == ["first", "other"]
    assert sorted(file.name for file in out.iterdir()) == ["first.png", "other.png"]


def test_package_without_a_usable_picture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no picture with a caption"):
        save_images([], tmp_path)


def test_each_source_finds_its_captioned_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "usr/share/tuxpaint/stamps"
    write_image(folder / "animals/frog.png", "green")
    (folder / "animals/frog.txt").write_text("A frog.\nfr.utf8=Une grenouille.\n", encoding="utf-8")
    write_image(folder / "animals/frog_mirror.png", "green")
    write_image(tmp_path / "package/assets/1f354.webp", "brown")
    write_image(tmp_path / "package/assets/1f44b-1f3fb.webp", "brown")
    write_image(tmp_path / "skimage/data/coffee.png", "brown")
    write_image(tmp_path / "skimage/data/phantom.png", "black")
    found = [*stamps(tmp_path), *emoji(tmp_path), *photographs("skimage/data")(tmp_path)]
    assert [(found_one.id, found_one.file.name) for found_one in found] == [
        ("stamp-animals-frog", "frog.png"),
        ("emoji-1f354", "1f354.webp"),
        ("photo-coffee", "coffee.png"),
    ]


@pytest.mark.parametrize(("number", "held"), [(1, 0), (2, 1), (14, 1), (200, 20)])
def test_a_tenth_is_held_out_and_at_least_one_of_several(number: int, held: int) -> None:
    assert len(heldout_ids([picture(str(index)) for index in range(number)], seed=0)) == held


def test_split_depends_on_the_seed_and_not_on_the_order() -> None:
    pictures = [picture(str(index)) for index in range(100)]
    assert heldout_ids(pictures, 0) == heldout_ids(pictures[::-1], 0)
    assert heldout_ids(pictures, 0) != heldout_ids(pictures, 1)


def test_caption_record_is_what_llava_reads() -> None:
    assert caption_record(picture("frog")) == {
        "id": "frog",
        "image": "images/frog.png",
        "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A frog."}],
    }


def test_instruct_records_ask_in_several_ways_and_answer_from_the_caption() -> None:
    asked, orders = set(), set()
    for index in range(60):
        turns = instruct_record(picture(str(index)), seed=0)["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt", "human", "gpt"]
        assert turns[0]["value"].startswith("<image>\n")
        assert "<image>" not in turns[2]["value"]
        assert {turns[1]["value"], turns[3]["value"]} <= {"The picture shows a frog.", "A frog.", "A frog"}
        asked |= {turns[0]["value"].removeprefix("<image>\n"), turns[2]["value"]}
        orders.add(turns[1]["value"])
    assert len(asked) == 5
    assert orders == {"The picture shows a frog.", "A frog.", "A frog"}
    assert instruct_record(picture("7"), seed=0) == instruct_record(picture("7"), seed=0)


def run(monkeypatch: pytest.MonkeyPatch, root: Path, license_name: str, *flags: str) -> None:
    package = Package("stamps", "1.0", "Debian", license_name, "copyright", root)
    source = Source(lambda _folder: package, "GPL-2", stamps, "A note.")
    monkeypatch.setattr(pictures, "SOURCES", {"tuxpaint": source})
    monkeypatch.setattr(sys, "argv", ["fetch_pictures.py", *flags])
    pictures.main()


@pytest.fixture
def stamp_root(tmp_path: Path) -> Path:
    folder = tmp_path / "package/usr/share/tuxpaint/stamps"
    for index in range(20):
        write_image(folder / f"{index}.png", f"#{index:02x}0000")
        (folder / f"{index}.txt").write_text(f"A frog of age {index % 19}.", encoding="utf-8")
    return tmp_path / "package"


def test_folder_is_complete_and_the_held_out_are_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stamp_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run(monkeypatch, stamp_root, "GPL-2", "--out", str(out))
    captions, instruct, heldout = (
        json.loads((out / name).read_text(encoding="utf-8"))
        for name in ("captions.json", "instruct.json", "heldout.json")
    )
    trained, held = {entry["id"] for entry in captions}, {entry["id"] for entry in heldout}
    assert (len(captions), len(heldout), trained & held) == (18, 2, set())
    assert {entry["id"] for entry in instruct} == trained
    assert all((out / entry["image"]).is_file() for entry in captions + heldout)
    assert "Debian: stamps 1.0 (20 pictures)" in (out / "LICENSES.md").read_text(encoding="utf-8")
    assert "18 to train on, 2 held out" in capsys.readouterr().out


def test_unexpected_licence_stops_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stamp_root: Path
) -> None:
    with pytest.raises(DataError, match="states the licence 'GPL-3', expected 'GPL-2'"):
        run(monkeypatch, stamp_root, "GPL-3", "--out", str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["package"]


def test_unknown_source_and_existing_folder_are_usage_errors(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stamp_root: Path
) -> None:
    with pytest.raises(UsageError, match=r"unknown \['flickr'\]; choose from tuxpaint"):
        run(monkeypatch, stamp_root, "GPL-2", "--sources", "flickr")
    with pytest.raises(UsageError, match="already exists"):
        run(monkeypatch, stamp_root, "GPL-2", "--out", str(tmp_path))
