"""Parquet with the images inside, against pyarrow's own reading."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from anyres_vlm.data.headers import read_size
from anyres_vlm.data.sources import open_source, read_records
from anyres_vlm.data.sources.record import Source
from anyres_vlm.errors import DataError
from anyres_vlm.geometry import Size
from anyres_vlm.schema import Record

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TURNS = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))


def encoded(number: int, image_format: str = "PNG") -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (number + 1, 5)).save(buffer, image_format)
    return buffer.getvalue()


def said(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def write(path: Path, first: int, count: int, group: int, **columns: Any) -> Path:
    """Rows with ids from `first` on; every fifth has no image."""
    rows = range(first, first + count)
    table = pa.table(
        {
            "id": pa.array([f"r{n}" for n in rows]),
            "image": pa.array([{"bytes": encoded(n), "path": f"{n}.png"} if n % 5 else None for n in rows], IMAGE),
            "unread": pa.array([os.urandom(50) for _ in rows]),
            "conversations": pa.array([said("<image>\n" * bool(n % 5) + "?", f"a{n}") for n in rows], TURNS),
            **columns,
        }
    )
    pq.write_table(table, path, row_group_size=group)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "train-1.parquet", 150, 110, 40)
    write(tmp_path / "train-0.parquet", 0, 150, 70)
    (tmp_path / "notes.txt").write_text("no data")
    return tmp_path


def test_rows_of_all_files_in_order(folder: Path) -> None:
    records = read_records(folder, None)
    files = [pq.read_table(folder / f"train-{n}.parquet").to_pylist() for n in range(2)]
    for record, row in zip(records, files[0] + files[1], strict=True):
        assert record.id == row["id"]
        assert [turn.text for turn in record.turns] == [turn["value"] for turn in row["conversations"]]
        assert [image.data for image in record.images] == ([row["image"]["bytes"]] if row["image"] else [])
    assert read_size(records[159].images[0]) == Size(height=5, width=160)
    assert records[159].images[0].name == f"{folder / 'train-1.parquet'} row 10, image of record r159"
    assert read_records(folder / "train-*.parquet", None) == records
    assert read_records(folder / "train-{0..1}.parquet", None) == records


def test_any_row_equals_the_stream(folder: Path) -> None:
    source = open_source(folder)
    stream = list(source.records(0, len(source)))
    assert [source.record(row) for row in (259, 0, 69, 70, 149, 150, 3, 3)] == [
        stream[row] for row in (259, 0, 69, 70, 149, 150, 3, 3)
    ]
    for start, stop in [(0, 0), (60, 75), (75, 80), (80, 260), (100, 101), (90, 95), (69, 151), (260, 260)]:
        assert list(source.records(start, stop)) == stream[start:stop]
    pieces = [item for row in range(0, 260, 7) for item in source.records(row, min(row + 7, 260))]
    assert pieces == stream
    interleaved = zip(source.records(0, 100), source.records(30, 130), strict=True)
    assert list(interleaved) == list(zip(stream[:100], stream[30:130], strict=True))


def test_a_row_group_is_read_once_by_pieces_of_a_stream(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    plain = pq.ParquetFile

    def counted(path: Path, **options: Any) -> pq.ParquetFile:
        opened.append(path)
        return plain(path, **options)

    monkeypatch.setattr("anyres_vlm.data.sources.parquet.pq.ParquetFile", counted)
    source = open_source(folder)
    for row in range(260):
        list(source.records(row, row + 1))
    assert len(opened) == 3 + 3  # row groups of both files
    for row in range(70):
        source.record(row)
    assert len(opened) == 7


def ids(source: Source, rows: list[int]) -> list[str]:
    return [source.record(row).id for row in rows] + [
        item.id for item in source.records(75, 150) if isinstance(item, Record)
    ]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_the_same(folder: Path, method: str) -> None:
    source = open_source(folder)
    list(source.records(0, 75))  # leaves an open file behind
    expected = ids(source, [200, 3])
    list(source.records(0, 75))
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(ids, (source, [200, 3])) == expected
    process = multiprocessing.get_context("fork").Process(target=lambda: os._exit(ids(source, [200, 3]) != expected))
    process.start()  # by inheritance, not by pickle
    process.join()
    assert process.exitcode == 0
    assert len(pickle.dumps(source)) < 3000


def test_shapes_of_image_columns(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "0.jpg")
    png, texts = encoded(3), [{"user": "What?", "assistant": "A star."}]
    columns = {
        "struct": [{"bytes": None, "path": "0.jpg"}],
        "list": [[{"bytes": png, "path": None}, {"bytes": None, "path": "0.jpg"}]],
        "binary": [png],
        "name": ["0.jpg"],
        "binaries": [[png, png]],
    }
    sizes = {"struct": [9], "list": [4, 9], "binary": [4], "name": [9], "binaries": [4, 4]}
    for kind, column in columns.items():
        path = tmp_path / f"{kind}.parquet"
        pq.write_table(pa.table({"images": column, "texts": [texts]}), path)
        (record,) = read_records(path, None)
        assert [read_size(image).width for image in record.images] == sizes[kind]
        assert record.turns[0].text == "<image>\n" * len(sizes[kind]) + "What?"
        assert record.id == "1"


def test_bad_rows_are_named_and_leave_the_others(tmp_path: Path) -> None:
    images = [{"bytes": None, "path": "../x.png"}, {"bytes": None, "path": None}, {"bytes": encoded(1), "path": None}]
    texts = [said("<image>?", "x")] * 2 + [said("?", "x")]
    columns = {"image": pa.array(images, IMAGE), "conversations": pa.array(texts, TURNS)}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    source = open_source(tmp_path / "a.parquet")
    for row, message in enumerate(["outside the image folder", "1 <image> .* 0 images", "0 <image> .* 1 images"]):
        with pytest.raises(DataError, match=rf"record {row + 1}: .*{message}"):
            source.record(row)
    assert all(isinstance(item, DataError) for item in source.records(0, 3))


def test_a_broken_row_group_leaves_the_others(folder: Path) -> None:
    path = folder / "train-0.parquet"
    group = pq.read_metadata(path).row_group(1)
    start = min(group.column(n).dictionary_page_offset or group.column(n).data_page_offset for n in range(5))
    content = bytearray(path.read_bytes())
    content[start : start + group.total_byte_size // 2] = bytes(group.total_byte_size // 2)
    path.write_bytes(content)
    source = open_source(folder)
    items = list(source.records(0, 260))
    assert [row for row, item in enumerate(items) if isinstance(item, DataError)] == list(range(70, 140))
    with pytest.raises(
        DataError, match=r"train-0\.parquet row 71: the row group cannot be read .* fetch the file again"
    ):
        source.record(70)
    assert source.record(140).id == "r140"


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 0, 10, 5)
    whole = (tmp_path / "a.parquet").read_bytes()
    for name, content in (("cut", whole[:-20]), ("empty", b""), ("text", b"hello " * 50)):
        (tmp_path / f"{name}.parquet").write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}\.parquet: not a whole Parquet file .* fetch it again"):
            open_source(tmp_path / f"{name}.parquet")
    pq.write_table(pa.table({"image": ["a"], "caption": ["b"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet: expected a column messages, .* got image, caption"):
        open_source(tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"none\.parquet: no such file; expected \.json"):
        open_source(tmp_path / "none.parquet")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"folder: no \.parquet or \.tar files directly in this folder"):
        open_source(tmp_path / "folder")


def test_fingerprint_follows_the_rows(tmp_path: Path) -> None:
    prints = {}
    for name, arguments in {"a": (0, 40, 20), "same": (0, 40, 20), "b": (1, 40, 20), "c": (0, 41, 20)}.items():
        (tmp_path / name).mkdir()
        prints[name] = open_source(
            write(tmp_path / name / "x.parquet", *arguments, unread=pa.array(range(arguments[1])))
        ).fingerprint()
    assert prints["a"] == prints["same"]
    assert len(set(prints.values())) == 3
