"""Test rate limits and Retry-After headers."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from anyres_vlm.instruct.endpoint import TokenBucket, retry_after


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
