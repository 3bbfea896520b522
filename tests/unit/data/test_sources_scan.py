"""Byte offsets of rows against json's own parsing of the whole file."""

from __future__ import annotations

import json
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from anyres_vlm.data.sources import json as scan
from anyres_vlm.data.sources.json import scan_rows
from anyres_vlm.errors import DataError

TRICKY = st.text(st.sampled_from('\\"[]{},:\n\r\t é\u2028猫😀a/'), max_size=12)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TRICKY
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TRICKY, inner, max_size=4), max_leaves=12
)


def rows(path: Path) -> list[Any]:
    content, offsets = path.read_bytes(), scan_rows(path)
    return [json.loads(content[start : end - 1]) for start, end in pairwise(offsets)]


@pytest.fixture(params=[1 << 20, 64, 5, 1])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Borders between chunks fall everywhere, inside strings and runs of backslashes too."""
    monkeypatch.setattr(scan, "CHUNK", request.param)
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scan")


@given(
    values=st.lists(VALUES, max_size=6),
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
    bom=st.booleans(),
    chunk=st.sampled_from([1, 3, 8, 1 << 20]),
)
@settings(max_examples=300, deadline=None)
def test_a_list_is_split_as_json_does(
    folder: Path, values: list[Any], indent: int | None, ascii_only: bool, bom: bool, chunk: int
) -> None:
    text = "\ufeff" * bom + " \n" + json.dumps(values, indent=indent, ensure_ascii=ascii_only) + "\r\n "
    (folder / "a.json").write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "CHUNK", chunk)
        assert rows(folder / "a.json") == values


@given(
    values=st.lists(st.dictionaries(TRICKY, VALUES, max_size=3), min_size=1, max_size=6),
    gaps=st.lists(st.sampled_from(["", " ", "\r", "\t \r"]), max_size=9),
)
@settings(max_examples=200, deadline=None)
def test_lines_are_rows_and_blank_ones_are_none(folder: Path, values: list[Any], gaps: list[str]) -> None:
    lines = [json.dumps(value, ensure_ascii=False) for value in values]
    for place, gap in enumerate(gaps):
        lines.insert(place % (len(lines) + 1), gap)
    (folder / "a.jsonl").write_bytes("\n".join(lines).encode())
    assert rows(folder / "a.jsonl") == values
    (folder / "a.jsonl").write_bytes(("\ufeff" + "\r\n".join(lines) + "\r\n").encode())
    assert rows(folder / "a.jsonl") == values


@given(text=st.text(st.sampled_from('[]{}",:\\ 1a'), max_size=14).map("[".__add__))
@settings(max_examples=1000, deadline=None)
def test_what_is_no_list_is_never_taken_for_one(folder: Path, text: str) -> None:
    """Either the scan refuses it or a row does; and every list is accepted."""
    (folder / "b.json").write_text(text)
    try:
        whole = json.loads(text)
    except ValueError:
        whole = None
    try:
        found: list[Any] | None = rows(folder / "b.json")
    except ValueError:  # a DataError too
        found = None
    assert found == (whole if isinstance(whole, list) else None)


@pytest.mark.parametrize("text", [r'["\\", "\\\\\"]", "\"", [[], {}]]', '[{"a": "\\\\"}, "]"]'])
def test_runs_of_backslashes(tmp_path: Path, text: str, chunk: int) -> None:
    (tmp_path / "a.json").write_text(text)
    assert rows(tmp_path / "a.json") == json.loads(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"id": 1,]', r"a\.json line 1 column 11: malformed JSON: Expecting property name"),
        ('[\n{"é": 1},\n{"id": "x', r"a\.json line 3 column 8: malformed JSON: Unterminated string"),
        ("[1, 2", "the list does not end: the file was cut short"),
        ("[1,\n", r"a\.json line 2 column 1: malformed JSON: Expecting value"),
        ("[1]\n\n [2]", r"a\.json line 3 column 2: malformed JSON: Extra data"),
        ('[1,\n{"a": 2]}, 3]', r"a\.json line 2 column 8: malformed JSON: Expecting ',' delimiter"),
        ('[{"a": 2}}', r"a\.json line 1 column 10: malformed JSON: Extra data"),
        ("[}", r"a\.json line 1 column 2: malformed JSON: Expecting value"),
        ('[[1,\n{"a": 2}, 3]', "the list does not end"),
        ("{}", "expected a list of records, got dict: put the record into a list"),
        ("hello", "expected a list of records, got 'hello'"),
        ("", "the file is empty"),
        (" \n", "the file is empty"),
    ],
)
def test_faults_have_a_place(tmp_path: Path, text: str, message: str, chunk: int) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=message):
        scan_rows(tmp_path / "a.json")


def test_memory_is_the_table_alone(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    with path.open("w") as stream:
        stream.write("[" + ",\n".join([json.dumps({"value": 'a "quoted" text, [x] ' * 500})] * 4000) + "]")
    tracemalloc.start()
    offsets = scan_rows(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(offsets) == 4001
    assert np.all(np.diff(offsets) > 0)
    assert peak < path.stat().st_size / 2  # 44 MB file; 11 MB, nearly all of it the chunk's own arrays
