"""Tar shards against tarfile's own reading."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import tarfile
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from anyres_vlm.data.blobs import read_blob
from anyres_vlm.data.headers import read_size
from anyres_vlm.data.sources import open_source, read_records
from anyres_vlm.data.sources.record import Source
from anyres_vlm.errors import DataError
from anyres_vlm.schema import Turn

FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tiff": "TIFF"}


def encoded(width: int, suffix: str) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (width, 5)).save(buffer, FORMATS[suffix.rpartition(".")[2].lower()])
    return buffer.getvalue()


def entry(images: int, **changes: object) -> bytes:
    turns = [{"from": "human", "value": "<image>\n" * images + "What?"}, {"from": "gpt", "value": "A star."}]
    return json.dumps({"conversations": turns, **changes}).encode()


def write(
    path: Path, members: dict[str, bytes] | list[tuple[str, bytes]], tar_format: int = tarfile.PAX_FORMAT
) -> Path:
    with tarfile.open(path, "w", format=tar_format) as archive:
        for name, content in members.items() if isinstance(members, dict) else members:
            header = tarfile.TarInfo(name)
            header.size, header.mtime = len(content), 1_700_000_000
            archive.addfile(header, BytesIO(content))
    return path


def samples(first: int, count: int) -> dict[str, bytes]:
    members = {}
    for number in range(first, first + count):
        suffix = list(FORMATS)[number % len(FORMATS)]
        members[f"part/{number:04d}.{suffix}"] = encoded(number + 1, suffix)
        members[f"part/{number:04d}.json"] = entry(1, id=f"r{number}", image="gone.jpg")
        members[f"part/{number:04d}.cls"] = b"7"
    return members


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(3):
        write(tmp_path / f"shard-{number:02d}.tar", samples(20 * number, 20))
    return tmp_path


def test_members_lie_where_tarfile_finds_them(folder: Path) -> None:
    records = read_records(folder, None)
    assert [record.id for record in records] == [f"r{n}" for n in range(60)]
    for number, record in enumerate(records):
        (image,) = record.images
        assert image.path is not None
        with tarfile.open(image.path) as archive:
            stored = archive.extractfile(f"part/{number:04d}.{list(FORMATS)[number % len(FORMATS)]}")
            assert stored is not None
            assert read_blob(image) == stored.read()
        assert read_size(image).width == number + 1
    assert records[25].images[0].name == f"{folder / 'shard-01.tar'}: part/0025.bmp".replace(
        "bmp", list(FORMATS)[25 % 7]
    )
    assert read_records(folder / "shard-{00..02}.tar", None) == records
    assert read_records(folder / "shard-0{0,2}.tar", None) == records[:20] + records[40:]
    assert read_records(folder / "shard-*.tar", None) == records
    assert read_records(folder / "shard-01.tar", None) == records[20:40]


def widths(source: Source, rows: list[int]) -> list[int]:
    return [read_size(source.record(row).images[0]).width for row in rows]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_any_row_in_any_process(folder: Path, method: str) -> None:
    source = open_source(folder)
    rows = random.Random(0).sample(range(60), 30)
    stream = list(source.records(0, 60))
    assert [source.record(row) for row in rows] == [stream[row] for row in rows]
    assert list(source.records(15, 45)) == stream[15:45]
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.apply(widths, (source, rows)) == [row + 1 for row in rows]
    assert len(pickle.dumps(source)) < 60 * 3 * 60


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_every_tar_format(tmp_path: Path, tar_format: int) -> None:
    long = "d.ir/" * 15 + "n" * 90 if tar_format == tarfile.USTAR_FORMAT else "d.ir/" * 60 + "né" * 90
    members = {
        f"{long}.png": encoded(3, "png"),
        f"{long}.txt": b"A star.",
        "./b.JPG": encoded(4, "jpg"),
        "./b.txt": b"x",
    }
    records = read_records(write(tmp_path / "a.tar", members, tar_format), None)
    assert [record.id for record in records] == [long, "./b"]
    assert [read_size(record.images[0]).width for record in records] == [3, 4]


def test_kinds_of_samples(tmp_path: Path) -> None:
    members = {
        "README": b"no sample",
        "._a.jpg": b"nor this",
        "a.jpg": encoded(1, "jpg"),
        "a.10.jpg": encoded(4, "jpg"),
        "a.2.png": encoded(3, "png"),
        "a.1.jpg": encoded(2, "jpg"),
        "a.json": entry(4),
        "b.left.webp": encoded(7, "webp"),
        "b.json": json.dumps({"url": "x", "caption": "of no use", "width": 9}).encode(),
        "b.txt": " Ein Stern: é\n".encode(),
        "c.json": entry(0),
        "dir.x/d.0.png": encoded(5, "png"),
        "dir.x/d.1.png": encoded(6, "png"),
        "dir.x/d.txt": b"Two.",
    }
    records = read_records(write(tmp_path / "a.tar", members), None)
    assert [record.id for record in records] == ["a", "b", "c", "dir.x/d"]
    assert [[read_size(image).width for image in record.images] for record in records] == [
        [1, 2, 3, 4],
        [7],
        [],
        [5, 6],
    ]
    assert records[1].turns == (Turn("user", "<image>"), Turn("assistant", "Ein Stern: é"))
    assert records[3].turns == (Turn("user", "<image>\n<image>"), Turn("assistant", "Two."))


def test_bad_samples_are_named_and_leave_the_others(tmp_path: Path) -> None:
    members = [
        ("a.jpg", b"x"),
        ("b.json", b'{"id": \n}'),
        ("c.jpg", b"x"),
        ("c.json", entry(2)),
        ("d.txt", b"\xff"),
        ("e.json", b"[1]"),
        ("f.json", entry(0)),
        ("f.json", entry(0)),
        ("g.txt", b"words without a picture"),
        ("h.json", entry(0)),
    ]
    source = open_source(write(tmp_path / "a.tar", members))
    reasons = [str(item) for item in source.records(0, len(source)) if isinstance(item, DataError)]
    expected = [
        "record a: expected a .json or .txt member, got .jpg",
        "a.tar: b.json line 2 column 1: malformed JSON: Expecting value",
        "record c: 2 <image> in the text, but 1 images",
        "a.tar: d.txt: cannot be read as UTF-8 text: invalid start byte",
        "record e: expected an object, got list",
        "has two neighbours f.json: rename one",
        "record g turn 1: the text is empty",
    ]
    for reason, words in zip(reasons, expected, strict=True):
        assert words in reason
    assert source.record(7).id == "h"


def test_tars_that_cannot_be_used(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.tar", samples(0, 3)).read_bytes()
    with tarfile.open(tmp_path / "a.tar") as archive:
        *_, last = archive
        end = last.offset_data + 512
    broken = bytearray(whole)
    broken[last.offset + 5] ^= 1
    backwards = tarfile.TarInfo("a.jpg")
    backwards.size = -1024
    cases = {
        "data": (whole[: last.offset - 100], "a broken or truncated tar .unexpected end of data"),
        "header": (whole[: last.offset + 100], "the tar is cut short: no end mark at byte"),
        "border": (whole[:end], rf"the tar is cut short: no end mark at byte {end}"),
        "bits": (bytes(broken), rf"a broken tar: no header at byte {last.offset}"),
        "cat": (whole + whole, rf"data after the tar's end at byte {end}: join tars with tar --concatenate"),
        "back": (
            backwards.tobuf(tarfile.GNU_FORMAT) * 2 + bytes(1024),
            "a broken or truncated tar",
        ),
        "text": (b"hello " * 500, "a broken or truncated tar"),
        "empty": (b"", "a broken or truncated tar"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / f"{name}.tar").write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}\.tar: {message}"):
            open_source(tmp_path / f"{name}.tar")
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    with pytest.raises(
        DataError, match=r"b\.tar\.gz: a compressed tar has no random access: unpack it to a plain \.tar"
    ):
        open_source(tmp_path / "b.tar.gz")
    os.rename(tmp_path / "b.tar.gz", tmp_path / "c.tar")
    with pytest.raises(DataError, match=r"c\.tar: a broken or truncated tar"):
        open_source(tmp_path / "c.tar")
    with pytest.raises(DataError, match=r"tar shards hold their images: leave the image folder .* out"):
        open_source(tmp_path / "a.tar", tmp_path)
    (tmp_path / "mixed").mkdir()
    (tmp_path / "a.tar").rename(tmp_path / "mixed" / "a.tar")
    (tmp_path / "mixed" / "b.parquet").touch()
    with pytest.raises(DataError, match=r"mixed: expected .* got a\.tar, b\.parquet"):
        open_source(tmp_path / "mixed")


def test_fingerprint_follows_texts_and_members(tmp_path: Path) -> None:
    def fingerprint(**changes: bytes) -> str:
        members = {"a.jpg": b"picture", "a.json": entry(1), **changes}
        return open_source(write(tmp_path / "a.tar", members)).fingerprint()

    variants = [{}, {"a.json": entry(1, id="b")}, {"a.json": entry(2)}, {"a.jpg": b"longer picture"}, {"b.txt": b""}]
    assert len({fingerprint(**variant) for variant in variants}) == len(variants)
    assert fingerprint() == fingerprint()
