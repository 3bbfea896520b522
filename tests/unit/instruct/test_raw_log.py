"""The log on the disk: torn tails, other writers, a full disk; and the rate and patience towards an endpoint."""

from __future__ import annotations

import asyncio
import os
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.instruct.endpoint import retry_after
from anyres_vlm.instruct.rate import TokenBucket
from anyres_vlm.instruct.raw_log import RawLog, read_log


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


def grants(per_minute: float, amounts: list[float]) -> list[float]:
    """When each amount was granted, in seconds from the start."""

    async def take_all() -> list[float]:
        bucket, loop = TokenBucket(per_minute), asyncio.get_running_loop()
        start, times = loop.time(), []

        async def take(amount: float) -> None:
            await bucket.take(amount)
            times.append(loop.time() - start)

        await asyncio.gather(*map(take, amounts))
        return times

    return asyncio.run(take_all())


@pytest.mark.parametrize("amount", [1.0, 7.0, 60.0])
def test_no_window_gets_more_than_its_share(amount: float) -> None:
    rate = 100 * amount  # a second
    times = grants(rate * 60, [amount] * 260)
    for first in range(260):
        for last in range(first, 260):
            taken = (last - first + 1) * amount
            assert taken <= rate * (times[last] - times[first]) + 2 * rate + amount  # two seconds' burst
    assert times[-1] >= 0.55  # 200 at once, 60 at a hundred a second


def test_more_than_the_bucket_holds_is_granted_and_paid_off() -> None:
    times = grants(60 * 1000, [2500, 1])
    assert times[0] < 0.2
    assert times[1] >= 0.49  # 500 short, at 1000 a second


@pytest.mark.parametrize(
    ("header", "seconds"),
    [(None, 0), ("7", 7), (" 0.25", 0.25), ("soon", 0), ("-5", 0), ("nan", 0), ("inf", 0), ("", 0)],
)
def test_retry_after(header: str | None, seconds: float) -> None:
    assert retry_after(header) == seconds


def test_retry_after_a_date() -> None:
    later = datetime.now(UTC) + timedelta(seconds=90)
    assert retry_after(format_datetime(later, usegmt=True)) == pytest.approx(90, abs=2)
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert retry_after("Wed, 21 Oct 2015 07:28:00 -0000") == 0
