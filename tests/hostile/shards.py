"""Hostile shards: tars, Parquet files and index files, and what the sources make of them."""

from __future__ import annotations

import io
import json
import os
import tarfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from configurations import refused
from hypothesis import strategies as st
from PIL import Image
from target import Target

from anyres_vlm.data.blobs import read_blob
from anyres_vlm.data.index.table import METADATA_KEY, SCHEMA, read_index
from anyres_vlm.data.sources import open_source
from anyres_vlm.errors import DataError, UsageError

ROWS = 5
TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
Edits = list[tuple[int, int]]


@cache
def png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(stream, "PNG")
    return stream.getvalue()


@cache
def good_tar(kind: int = tarfile.PAX_FORMAT) -> bytes:
    """Five samples; pax headers in one."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=kind) as archive:
        for row in range(ROWS):
            for suffix, content in (("json", json.dumps({"conversations": TALK}).encode()), ("png", png())):
                member = tarfile.TarInfo(f"{'long' * 30 if row == 2 else 's'}{row}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


@cache
def good_parquet() -> bytes:
    images = pa.array([{"bytes": png(), "path": f"{row}.png"} for row in range(ROWS)])
    table = pa.table({"id": [str(row) for row in range(ROWS)], "image": images, "conversations": [TALK] * ROWS})
    stream = io.BytesIO()
    pq.write_table(table, stream, row_group_size=2)
    return stream.getvalue()


def index_table() -> pa.Table:
    """Five good rows as `anyres index` writes them."""
    row: dict[str, Any] = {"id": "a", "source": "s", "heights": [20], "widths": [30], "tiles": 2, "visual_tokens": 8}
    row |= {"newline_tokens": 2, "text_tokens": 5, "tokens": 15, "supervised": 3, "status": "ok"}
    table = pa.Table.from_pylist([row | {"row": at} for at in range(ROWS)], SCHEMA)
    return table.replace_schema_metadata({METADATA_KEY: json.dumps({"format": 1, "key": "k", "settings": {}}).encode()})


def index_bytes(table: pa.Table) -> bytes:
    stream = io.BytesIO()
    pq.write_table(table, stream)
    return stream.getvalue()


def edited(content: bytes, edits: Edits, cut: int | None) -> bytes:
    """Other bytes at some places, counted from the end where negative, and an end too early."""
    changed = bytearray(content)
    for place, value in edits:
        changed[place % len(changed)] = value
    return bytes(changed if cut is None else changed[: cut % len(changed)])


def read_all(path: Path) -> bool:
    """Every row by stream and alone, every image's bytes; True if a record was read."""
    try:
        source = open_source(path, None)
        source.fingerprint()
    except (DataError, UsageError) as error:
        return refused(error)
    found = list(source.records(0, len(source)))
    assert len(found) == len(source)
    for row, item in enumerate(found):
        try:
            alone: Any = source.record(row)
        except DataError as error:
            alone = error
        assert type(alone) is type(item), f"row {row} streamed {item!r}, alone {alone!r}"
        for image in () if isinstance(item, DataError) else item.images:
            assert image.path is None or image.path.is_relative_to(path.parent), image
            with suppress(DataError):
                read_blob(image)
    return any(not isinstance(item, DataError) for item in found)


def check_tar(content: bytes, folder: Path) -> bool:
    (folder / "hostile.tar").write_bytes(content)
    return read_all(folder / "hostile.tar")


def check_parquet(content: bytes, folder: Path) -> bool:
    (folder / "hostile.parquet").write_bytes(content)
    return read_all(folder / "hostile.parquet")


def check_column(case: tuple[str, list[Any]], folder: Path) -> bool:
    """A good file but for one column of other values."""
    name, values = case
    table = pq.read_table(io.BytesIO(good_parquet()))
    try:
        column = pa.array((values * ROWS)[:ROWS] if values else [None] * ROWS)
    except (pa.ArrowException, OverflowError):
        return False  # not even Parquet can hold it
    table = table.drop_columns([name] if name in table.column_names else []).append_column(name, column)
    stream = io.BytesIO()
    try:
        pq.write_table(table, stream)
    except pa.ArrowNotImplementedError:  # a struct without fields
        return False
    return check_parquet(stream.getvalue(), folder)


def check_index(content: bytes, folder: Path) -> bool:
    """What planning and training read of an index."""
    path = folder / "index.parquet"
    path.write_bytes(content)
    try:
        index = read_index(path)
        for at in range(min(len(index), 9)):
            index.id(at)
            index.sizes(at)
        return bool(index.key and len(index.settings) >= 0 and len(index.row) == len(index.ok) and len(index.tiles))
    except (DataError, UsageError) as error:
        return refused(error)


def check_changed(case: tuple[str, Edits, int | None], folder: Path) -> bool:
    """A file that changes between opening and reading."""
    suffix, edits, cut = case
    path = folder / f"hostile.{suffix}"
    content = good_tar() if suffix == "tar" else good_parquet()
    path.write_bytes(content)
    source = open_source(path, None)
    path.write_bytes(edited(content, edits, cut))
    good = 0
    for row in range(len(source)):
        with suppress(DataError):
            good += len([read_blob(image) for image in source.record(row).images])
    assert len(list(source.records(0, len(source)))) == len(source)
    os.remove(path)
    refused = source.records(0, len(source))
    assert suffix == "parquet" or all(isinstance(item, DataError) for item in refused)
    return good > 0


edits = st.lists(st.tuples(st.integers(-800, 20_000), st.integers(0, 255)), max_size=6)
cuts = st.none() | st.integers(0, 30_000)
header_edits = st.lists(
    st.tuples(st.integers(0, 19), st.integers(0, 511), st.sampled_from([*b"01237 9-x\0\x80\xff/.LSKgx"])), max_size=8
).map(lambda found: [(512 * block + place, value) for block, place, value in found])
NAMES = ["from", "value", "role", "content", "bytes", "path", "type"]
cells = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 63) - 1)
    | st.floats()
    | st.text(max_size=6)
    | st.binary(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=3),
    max_leaves=6,
)


def repaired(content: bytes) -> bytes:
    """The same with right checksums, so that other fields of a header count."""
    changed = bytearray(content)
    for at in range(0, len(changed) - 511, 512):
        if changed[at + 257 : at + 262] == b"ustar":
            changed[at + 148 : at + 156] = b" " * 8
            changed[at + 148 : at + 156] = b"%06o\0 " % sum(changed[at : at + 512])
    return bytes(changed)


tars = st.builds(edited, st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]).map(good_tar), edits, cuts)
TARGETS = {
    "shards: tar": Target(
        tars | st.builds(edited, st.just(good_tar()), header_edits, cuts).map(repaired), check_tar, coverage=True
    ),
    "shards: Parquet bytes": Target(st.builds(edited, st.just(good_parquet()), edits, cuts), check_parquet),
    "shards: Parquet columns": Target(
        st.tuples(
            st.sampled_from(["id", "task", "image", "images", "conversations", "messages", "texts"]),
            st.lists(cells, max_size=3),
        ),
        check_column,
    ),
    "shards: index": Target(st.builds(edited, st.just(index_bytes(index_table())), edits, cuts), check_index),
    "shards: changed": Target(st.tuples(st.sampled_from(["tar", "parquet"]), edits, cuts), check_changed),
}
