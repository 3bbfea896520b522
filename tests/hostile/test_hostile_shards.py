"""Hostile shards end in an error or in counted rejects."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
import shards
from shards import (
    SCHEMA,
    TARGETS,
    check_index,
    check_parquet,
    check_tar,
    good_tar,
    index_bytes,
    index_table,
    png,
    repaired,
)
from target import explore
from watch import watched


def tar_of(*members: tuple[tarfile.TarInfo, bytes], pax: dict[str, str] | None = None) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", pax_headers=pax) as archive:
        for member, content in members:
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.type, found.linkname = kind, link
    return found


def with_size(field: bytes, block: int = 0) -> bytes:
    """The size field of a header replaced, with the right checksum."""
    content = bytearray(good_tar(tarfile.GNU_FORMAT))
    content[block * 512 + 124 : block * 512 + 136] = field
    return repaired(bytes(content))


TALK = b'{"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}'
TARS = {
    "empty": b"",
    "gzip": gzip.compress(good_tar()),
    "zip": b"PK\x03\x04" + bytes(600),
    "negative": with_size(b"\xff" * 12),
    "huge": with_size(b"77777777777\0"),
    "base256": with_size(b"\x80" + b"\x7f" * 11),
    "junk": with_size(b"9x$-1\0\0\0\0\0\0\0"),
    "overlap": with_size(b"00000000000\0"),
    "links": tar_of(
        (member("a.png", tarfile.SYMTYPE, "/etc/passwd"), b""),
        (member("a.json", tarfile.LNKTYPE, "../../x"), b""),
        (member("b.png", tarfile.CHRTYPE), b""),
        (member("b.json", tarfile.FIFOTYPE), b""),
    ),
    "no_json": tar_of((member("a.png"), png())),
    "no_image": tar_of((member("a.json"), b'{"conversations": [{"from": "human", "value": "<image>"}]}')),
    "pair": tar_of((member("a.json"), TALK), (member("a.json"), TALK)),
    "pax_size": tar_of((member("a.json"), TALK), pax={"size": "99999999999999999999999"}),
    "pax_sparse": tar_of((member("a.json"), TALK), pax={"GNU.sparse.map": "0,1," * 999, "GNU.sparse.major": "0"}),
}


@pytest.mark.parametrize("name", TARGETS)
def test_any_input_is_read_or_refused(name: str) -> None:
    tally = explore(TARGETS[name], examples=150, fixed=True)
    assert tally.rejected > 5
    assert not tally.faults, tally.faults


@pytest.mark.parametrize("name", TARS)
def test_each_known_tar_is_refused(name: str, tmp_path: Path) -> None:
    with watched(tmp_path):
        assert not check_tar(TARS[name], tmp_path)


def test_names_that_lead_out_lead_nowhere(tmp_path: Path) -> None:
    content = tar_of((member("../../a.json"), TALK), (member("/etc/b.json"), TALK))
    with watched(tmp_path):
        assert check_tar(content, tmp_path)  # keys alone: members are read in place, never unpacked


def test_a_pax_bomb_takes_no_memory(tmp_path: Path) -> None:
    content = bytearray(tar_of((member("a.json"), TALK), pax={"comment": "x" * 99}))
    content[124:136] = b"77777777777\0"  # says 8 GiB of header
    with watched(tmp_path):
        assert not check_tar(repaired(bytes(content)), tmp_path)


def test_cut_anywhere(tmp_path: Path) -> None:
    whole = good_tar()
    for end in range(0, len(whole), 997):
        with watched(tmp_path):
            check_tar(whole[:end], tmp_path)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1PAR1", b"PAR1" + b"\xff" * 4 + b"PAR1", b"x" * 99])
def test_what_is_no_parquet(content: bytes, tmp_path: Path) -> None:
    with watched(tmp_path):
        assert not check_parquet(content, tmp_path)
        assert not check_index(content, tmp_path)


@pytest.mark.parametrize("column", SCHEMA.names)
@pytest.mark.parametrize("values", [["x"] * 5, [None] * 5, [-1] * 5, [[1, -2]] * 5])
def test_an_index_with_one_wrong_column(column: str, values: list[object], tmp_path: Path) -> None:
    table = index_table()
    at = table.column_names.index(column)
    for changed in (table.set_column(at, column, pa.array(values)), table.remove_column(at)):
        with watched(tmp_path):
            check_index(index_bytes(changed.replace_schema_metadata(table.schema.metadata)), tmp_path)


@pytest.mark.parametrize("note", [b"", b"[]", b"{}", b"\xff", b"3", b"[" * 9999, b'{"format": 1}'])
def test_an_index_with_a_wrong_note(note: bytes, tmp_path: Path) -> None:
    content = index_bytes(index_table().replace_schema_metadata({shards.METADATA_KEY: note}))
    with watched(tmp_path):
        assert not check_index(content, tmp_path)
