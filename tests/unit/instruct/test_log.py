"""Test the raw log on the disk: torn tails, other writers, a full disk."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.instruct.log import RawLog, read_log


def append(path: Path, *numbers: int) -> list[int]:
    async def all_at_once() -> list[int]:
        log = RawLog(path)
        try:
            return await asyncio.gather(*(log.append({"n": number}) for number in numbers))
        finally:
            await log.close()

    return asyncio.run(all_at_once())


def test_appends_come_back_at_their_offsets(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log.jsonl"
    offsets = append(path, *range(100))
    assert [(offset, entry["n"]) for offset, entry in read_log(path)] == list(zip(offsets, range(100), strict=True))


@pytest.mark.parametrize("tail", [b'{"n": 1', b"\xff\xfe", b"x" * 200_000])
def test_a_torn_tail_is_ignored_and_then_cut_off(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "log.jsonl"
    append(path, 1, 2)
    with path.open("ab") as stream:
        stream.write(tail)
    assert [entry["n"] for _, entry in read_log(path)] == [1, 2]
    append(path, 3)
    assert [entry["n"] for _, entry in read_log(path)] == [1, 2, 3]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"n": 1}\nbroken\n{"n": 2}\n')
    with pytest.raises(DataError, match=r"log\.jsonl line 2: not an entry of a raw log"):
        list(read_log(path))


def test_one_process_writes(tmp_path: Path) -> None:
    log = RawLog(tmp_path / "log.jsonl")
    with pytest.raises(UsageError, match="another process is generating into this folder"):
        RawLog(tmp_path / "log.jsonl")
    asyncio.run(log.close())
    asyncio.run(RawLog(tmp_path / "log.jsonl").close())


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.jsonl"
    append(path, 1)
    write = os.write

    def half(descriptor: int, content: memoryview) -> int:
        if len(content) < 6:
            raise OSError(28, "No space left on device")
        return write(descriptor, content[: len(content) // 2])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(OSError, match="No space left"):
        append(path, 2)
    monkeypatch.undo()
    append(path, 3)
    assert path.read_text() == '{"n": 1}\n{"n": 3}\n'
