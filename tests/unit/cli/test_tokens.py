"""`anyres tokens` and the frame of the command line: output, exit status and what is said about mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from anyres_vlm import __version__
from anyres_vlm.cli.main import main
from anyres_vlm.data.tile_picture import format_histogram
from anyres_vlm.geometry import Grid, Size, Tiling, plan_tiles

SCRIPT = Path(__file__).parents[3] / "tools" / "count_tokens.py"


def anyres(*arguments: str | Path) -> int:
    """The exit status of a command, called as the installed script calls it."""
    with pytest.raises(SystemExit) as stop:
        sys.exit(main([str(argument) for argument in arguments]))
    return int(stop.value.code or 0)


def save(path: Path, width: int, height: int, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (200, 60, 30)).save(path, **options)
    return path


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    return save(tmp_path / "photo.jpg", 640, 480)


def rows(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return json.loads(capsys.readouterr().out)


def test_json_has_the_documented_fields(photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert anyres("tokens", photo, "--json") == 0
    assert rows(capsys) == [
        {
            "path": str(photo),
            "width": 640,
            "height": 480,
            "canvas": [672, 672],
            "grid": [2, 2],
            "tiles": 5,
            "visual_tokens": 2304,
            "newline_tokens": 36,
            "total": 2340,
        }
    ]


@pytest.mark.parametrize(
    ("flags", "tiling"),
    [
        ([], Tiling.from_grid(Grid(2, 2))),
        (["--dialect", "llava"], Tiling.from_grid(Grid(2, 2), dialect="llava")),
        (["--layout", "flat", "--grid", "3x3"], Tiling.from_grid(Grid(3, 3), layout="flat")),
        (["--tile", "84", "--patch", "14", "--grid", "1x3"], Tiling.from_grid(Grid(1, 3), tile=84, patch=14)),
    ],
)
def test_every_option_reaches_the_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], tiling: Tiling
) -> None:
    sizes = [(792, 1408), (300, 200), (3000, 16), (1, 1)]
    files = [save(tmp_path / f"{width}x{height}.png", width, height) for width, height in sizes]
    assert anyres("tokens", *files, "--json", *flags) == 0
    for (width, height), row in zip(sizes, rows(capsys), strict=True):
        plan = plan_tiles(Size(height=height, width=width), tiling)
        assert (row["width"], row["height"]) == (width, height)
        assert row["canvas"] == [plan.canvas.width, plan.canvas.height]
        assert row["grid"] == [plan.grid.rows, plan.grid.cols]
        assert row["tiles"] == plan.num_tiles
        assert (row["visual_tokens"], row["newline_tokens"]) == (plan.visual_tokens, plan.newline_tokens)
        assert row["total"] == plan.total_tokens


def test_thumbnail_alone_is_a_grid_of_one(photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert anyres("tokens", photo, "--grid", "1x1", "--json") == 0
    (row,) = rows(capsys)
    assert (row["grid"], row["canvas"], row["tiles"], row["total"]) == ([1, 1], [336, 336], 1, 576)


@pytest.mark.parametrize("name", ["turned.jpg", "turned.png", "turned.webp", "turned.tiff"])
def test_orientation_is_applied(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    assert anyres("tokens", save(tmp_path / name, 640, 480, exif=exif), "--json") == 0
    (row,) = rows(capsys)
    assert (row["width"], row["height"], row["total"]) == (480, 640, 2352)


def test_one_image_is_a_line_and_the_choice_explained(photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert anyres("tokens", photo) == 0
    first, empty, names, *candidates, why = capsys.readouterr().out.splitlines()
    assert first == f"{photo}: 640x480 -> 2x2 grid, 5 tiles, 2,304 visual + 36 newline = 2,340 tokens"
    assert empty == ""
    assert names.split()[0] == "canvas"
    # by hand: at 0.7 of its size the photo has 448 x 336 pixels, at 0.525 336 x 252; 672 x 672 keeps all 307,200
    assert [line.split() for line in candidates] == [
        ["672x336", "1x2", "150,528", "49.0%", "75,264", "33.3%"],
        ["336x672", "2x1", "84,672", "27.6%", "141,120", "62.5%"],
        ["672x672", "2x2", "307,200", "100.0%", "144,384", "32.0%", "chosen"],
        ["1008x336", "1x3", "150,528", "49.0%", "188,160", "55.6%"],
        ["336x1008", "3x1", "84,672", "27.6%", "254,016", "75.0%"],
    ]
    assert why == "672x672 keeps most of the image."


@pytest.mark.parametrize(
    ("size", "flags", "why"),
    [
        ((184, 161), ["--dialect", "llava"], "336x672 is the first in dialect llava of 2 equally good candidates"),
        ((184, 161), ["--dialect", "hf"], "672x336 is the first in dialect hf of 2 equally good candidates"),
        (
            (640, 480),
            ["--grid", "3x3"],
            "672x672 wastes the least area of the 6 candidates that keep most of",
        ),
        ((640, 480), ["--grid", "1x2"], "672x336 keeps most of the image"),
        ((640, 480), ["--grid", "1x1"], "There is no candidate canvas: only the thumbnail is used"),
    ],
)
def test_why_a_canvas_was_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], size: tuple[int, int], flags: list[str], why: str
) -> None:
    assert anyres("tokens", save(tmp_path / "a.png", *size), *flags) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].startswith(why)
    assert printed.count("  chosen") == ("1x1" not in flags)


def test_several_images_are_a_table_and_a_histogram(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, width, height in [("a", 640, 480), ("b", 640, 480), ("c", 672, 672), ("d", 480, 640)]:
        save(tmp_path / f"{name}.png", width, height)
    assert anyres("tokens", tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["image", "size", "grid", "tiles", "visual", "newline", "tokens"]
    assert lines[3].split() == [str(tmp_path / "c.png"), "672x672", "2x2", "5", "2,880", "48", "2,928"]
    assert lines[6] == "images by tokens"
    assert [line.split() for line in lines[7:10]] == [
        ["2,340", "2", "#" * 40],
        ["2,352", "1", "#" * 20],
        ["2,928", "1", "#" * 20],
    ]
    assert lines[-1] == "4 images: 20 tiles, 9,960 tokens"


def test_a_histogram_of_many_values_counts_each_once() -> None:
    values = [number * number for number in range(100)]
    bars = [line.replace(",", "").split() for line in format_histogram(values).splitlines()]
    assert len(bars) <= 12
    edges = [(int(low), int(high)) for low, _, high, *_ in bars]
    assert edges[0][0] == 0
    assert edges[-1][1] >= 99 * 99
    assert all(low == before + 1 for (_, before), (low, _) in pairwise(edges))
    for (low, high), bar in zip(edges, bars, strict=True):
        assert int(bar[3]) == len([value for value in values if low <= value <= high])


def test_unreadable_files_are_reported_and_the_others_counted(
    tmp_path: Path, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing, text, empty = tmp_path / "missing.jpg", tmp_path / "text.png", tmp_path / "empty.jpg"
    text.write_text("not a picture")
    empty.touch()
    bad = [missing, text, empty]
    assert anyres("tokens", *bad, photo, "--json") == 1
    *errors, good = rows(capsys)
    assert good["total"] == 2340
    assert [row["path"] for row in errors] == [str(path) for path in bad]
    for row in errors:
        assert set(row) == {"path", "error"}
        assert row["error"].startswith(row["path"])
    assert anyres("tokens", *bad, photo) == 1
    printed = capsys.readouterr()
    assert "1 image: 5 tiles, 2,340 tokens" in printed.out
    for path in bad:
        assert f"error: {path}: " in printed.err
    assert "Traceback" not in printed.err


def test_folders_and_globs(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b.PNG", "a.jpg", "below/c.webp", "below/deeper/d.gif"):
        save(Path("images", name), 30, 20)
    Path("images", "notes.txt").write_text("no image")
    everything = ["images/a.jpg", "images/b.PNG", "images/below/c.webp", "images/below/deeper/d.gif"]
    for argument, expected in [
        ("images", everything),
        ("images/*.jpg", everything[:1]),
        ("images/**/*.[gw]*", everything[2:]),
    ]:
        assert anyres("tokens", argument, "--json") == 0
        assert [row["path"] for row in rows(capsys)] == expected


def test_file_with_the_name_of_a_pattern(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = save(tmp_path / "scan[1].png", 30, 20)
    assert anyres("tokens", file, "--json") == 0
    assert rows(capsys)[0]["path"] == str(file)


@pytest.mark.parametrize(("name", "reason"), [("*.gif", "no such file"), ("nothing", "a folder, not a file")])
def test_nothing_found_is_an_error_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, reason: str
) -> None:
    (tmp_path / "nothing").mkdir()
    file = save(tmp_path / "a.png", 30, 20)
    assert anyres("tokens", tmp_path / name, file) == 1
    said = capsys.readouterr()
    assert f"error: {tmp_path / name}: {reason}" in said.err
    assert "1 image: 3 tiles" in said.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tokens", "x.jpg", "--grid", "2"], "error: grid '2': expected ROWSxCOLUMNS such as 2x2"),
        (["tokens", "x.jpg", "--grid", "0x3"], "error: grid '0x3': rows and columns must be from 1 to 12"),
        (["tokens", "x.jpg", "--tile", "100"], "error: tile side 100 must be a positive multiple of the patch side 14"),
        (["tokens", "x.jpg", "y.jpg", "--draw", "out.png"], "error: --draw draws one image, got 2"),
        (["tokens", "x.jpg", "--layout", "tight"], "'tight' is not one of 'spatial_unpad', 'flat'"),
        (["tokens", "x.jpg", "--grod", "2x2"], "--grid"),
        (["tokens"], "Missing argument"),
        (["tokns", "x.jpg"], "Did you mean 'tokens'?"),
    ],
)
def test_wrong_use_exits_2_and_says_what_is_right(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert anyres(*arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""


@pytest.mark.parametrize("place", [0, 1, 4])
def test_debug_anywhere_adds_the_traceback(capsys: pytest.CaptureFixture[str], place: int) -> None:
    arguments = ["tokens", "x.jpg", "--grid", "2"]
    arguments.insert(place, "--debug")
    assert anyres(*arguments) == 2
    printed = capsys.readouterr().err
    assert "Traceback (most recent call last)" in printed
    assert printed.splitlines()[-1].startswith("error: grid '2'")


def test_interruption_exits_130(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(path: Path) -> Size:
        raise KeyboardInterrupt

    monkeypatch.setattr("anyres_vlm.data.tile_picture.read_size", interrupt)
    assert anyres("tokens", photo) == 130


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert anyres("--help") == 0
    printed = capsys.readouterr().out
    assert "tokens" in printed
    assert "--debug" in printed
    assert anyres("--version") == 0
    assert __version__ in capsys.readouterr().out


def test_picture_shows_the_image_on_its_canvas(tmp_path: Path, photo: Path) -> None:
    out = tmp_path / "tiling.png"
    assert anyres("tokens", photo, "--draw", out) == 0
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) >= 300
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3).astype(int)
    image_share = (np.abs(pixels - (200, 60, 30)).max(axis=1) <= 8).mean()
    assert image_share > 0.25, "the image fills most of the canvas and the thumbnail"
    assert len(np.unique(pixels, axis=0)) > 10, "edges, padding and text have colours of their own"


def test_picture_that_cannot_be_written(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert anyres("tokens", photo, "--draw", tmp_path / "no" / "such" / "folder.png") == 1
    assert "No such file or directory" in capsys.readouterr().err


def test_script_works_from_a_clone_without_torch(photo: Path, tmp_path: Path) -> None:
    """Run from elsewhere and without the repository on the path, as a person with a fresh clone would."""
    check = f"import runpy, sys; sys.argv = ['count_tokens.py', {str(photo)!r}, '--json']\n"
    check += f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    check += "finally: print(*{'torch', 'transformers', 'numpy', 'typer'} & set(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr.strip()) == (0, "")
    assert json.loads(done.stdout)[0]["total"] == 2340


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ([], 0),
        (["--json", "--grid", "3x3", "--layout", "flat", "--dialect", "llava"], 0),
        (["--tile", "224", "--patch", "16"], 0),
        (["--grid", "2"], 2),
        (["--tile", "15"], 2),
        (["--layout", "round"], 2),
        (["missing.jpg"], 1),
    ],
)
def test_script_does_what_the_command_does(
    photo: Path, capsys: pytest.CaptureFixture[str], options: list[str], status: int
) -> None:
    assert anyres("tokens", photo, *options) == status
    printed = capsys.readouterr()
    done = subprocess.run([sys.executable, SCRIPT, photo, *options], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (status, printed.out)
    if "--layout" not in options:  # the parsers word it differently
        assert done.stderr == printed.err


def test_what_macos_and_windows_leave_in_folders_is_no_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "__MACOSX").mkdir()
    for name in ("._a.png", "__MACOSX/a.png"):
        (tmp_path / name).write_bytes(b"junk")
    for asked in (str(tmp_path), f"{tmp_path}/**/*.png"):
        assert main(["tokens", asked, "--json"]) == 0
        assert [row["path"] for row in json.loads(capsys.readouterr().out)] == [str(tmp_path / "a.png")]
