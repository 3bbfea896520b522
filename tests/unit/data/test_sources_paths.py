"""How records name image files: what leads into the image folder is taken, everything else refused with a remedy."""

from __future__ import annotations

import os
from pathlib import Path
from unicodedata import normalize

import pytest

from anyres_vlm.data.blobs import is_sidecar
from anyres_vlm.data.sources.paths import path_inside
from anyres_vlm.errors import DataError

FILES = ["a.png", "sub/b c.png", "sub/Größe.png", "Case/D.PNG", "x:y.png", "data:1.png", "100%25.png"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in FILES:
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    (tmp_path / "alias").symlink_to(tmp_path / "images")
    (tmp_path / "outside.png").write_bytes(b"outside")
    return tmp_path / "images"


@pytest.mark.parametrize(
    ("name", "file"),
    [
        *((name, name) for name in FILES),
        ("./a.png", "a.png"),
        ("sub//b c.png", "sub/b c.png"),
        ("sub/../a.png", "a.png"),
        ("../images/a.png", "a.png"),
        ("sub\\b c.png", "sub/b c.png"),
        (".\\sub\\..\\a.png", "a.png"),
        ("{folder}/sub/b c.png", "sub/b c.png"),
        ("{folder}/../images/a.png", "a.png"),
        ("{folder}/../alias/a.png", "a.png"),
        ("file://{folder}/sub/b%20c.png", "sub/b c.png"),
        ("file://localhost{folder}/sub/Gr%C3%B6%C3%9Fe.png", "sub/Größe.png"),
        ("FILE:{folder}/a.png", "a.png"),
        ("file://sub/b%20c.png", "sub/b c.png"),
        ("file://{folder}/100%2525.png", "100%25.png"),
        ("case/d.png", "Case/D.PNG"),
        ("SUB/B C.png", "sub/b c.png"),
        (normalize("NFD", "sub/Größe.png"), "sub/Größe.png"),
    ],
)
def test_names_that_lead_into_the_folder(folder: Path, name: str, file: str) -> None:
    path = path_inside(folder, name.format(folder=folder), "record r")
    assert path.read_bytes() == file.encode()


def test_a_name_in_nfc_finds_a_file_in_nfd(folder: Path) -> None:
    name = normalize("NFD", "été.png")
    (folder / name).write_bytes(b"x")
    assert path_inside(folder, normalize("NFC", name), "record r").name == name


def test_relative_and_linked_image_folders(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    for base in (Path("images"), Path("alias"), Path(), folder.parent / "alias"):
        inner = folder / "a.png" if base != Path() else folder.parent / "images" / "a.png"
        assert path_inside(base, str(inner), "record r").read_bytes() == b"a.png"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../outside.png", "outside the image folder"),
        ("..\\outside.png", "outside the image folder"),
        ("sub/../../outside.png", "outside the image folder"),
        ("{folder}/../outside.png", "outside the image folder"),
        ("{folder}2/a.png", "outside the image folder"),
        ("/etc/passwd", "outside the image folder"),
        ("file:///etc/passwd", "outside the image folder"),
        ("file://..%2Foutside.png", "outside the image folder"),
        ("file:///%00", "must be a file name"),
        ("C:\\images\\a.png", "is a Windows path"),
        ("file:///C:/images/a.png", "is a Windows path"),
        ("", "must be a file name"),
    ],
)
def test_names_that_lead_elsewhere(folder: Path, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        path_inside(folder, name.format(folder=folder), "record r")


@pytest.mark.parametrize("url", ["http://x/a.png", "HTTPS://x/a.png", "s3://b/a.png", "gs://b/a.png", "hf://d/a.png"])
def test_urls_say_what_to_do(folder: Path, url: str) -> None:
    with pytest.raises(DataError, match="is a URL: download the images first") as caught:
        path_inside(folder, url, "record r")
    assert caught.value.kind == "remote_image"


def test_images_written_into_the_record_say_what_to_do(folder: Path) -> None:
    with pytest.raises(DataError, match="is a URL: download") as caught:
        path_inside(folder, f"data:image/png;base64,{'A' * 100_000}", "record r")
    assert len(str(caught.value)) < 500


def test_another_spelling_does_not_lead_out_by_a_link(folder: Path) -> None:
    (folder / "Link.png").symlink_to(folder.parent / "outside.png")
    with pytest.raises(DataError, match="leads out of the image folder by a link"):
        path_inside(folder, "link.png", "record r")


def test_two_files_that_differ_in_case_alone_are_not_guessed(folder: Path) -> None:
    (folder / "e.png").touch()
    (folder / "E.png").touch()
    if len(os.listdir(folder)) < 8:
        pytest.skip("this file system knows no case")
    assert not path_inside(folder, "e.PNG", "record r").exists()


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("._a.png", True),
        ("sub/._a.png", True),
        (".DS_Store", True),
        ("THUMBS.DB", True),
        ("a/desktop.ini", True),
        ("__MACOSX/a.png", True),
        ("a.png", False),
        (".hidden.png", False),
        ("a._b.png", False),
        ("", False),
    ],
)
def test_sidecars(name: str, is_one: bool) -> None:
    assert is_sidecar(name) is is_one
