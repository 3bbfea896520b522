"""`anyres tokens` and the frame of the command line: output, exit status and what is said about mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from anyres_vlm import __version__
from anyres_vlm.cli.main import main
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


def test_plain_output_is_a_line_an_image_and_a_total(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = save(tmp_path / "one.png", 640, 480), save(tmp_path / "two.png", 672, 672)
    assert anyres("tokens", one, two) == 0
    first, second, total = capsys.readouterr().out.splitlines()
    assert str(one) in first
    assert "2,304 visual" in first
    assert "2,340 tokens" in first
    assert str(two) in second
    assert "2,928 tokens" in second
    assert "5,268 tokens" in total
    assert "10 tiles" in total


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
    assert "2,340 tokens" in printed.out
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
    assert "1 image:" in said.out


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

    monkeypatch.setattr("anyres_vlm.cli.tokens.read_size", interrupt)
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
    check += "finally: print(*{'torch', 'transformers', 'numpy'} & set(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr.strip()) == (0, "")
    assert json.loads(done.stdout)[0]["total"] == 2340
