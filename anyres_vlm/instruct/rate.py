"""A token bucket: so much a minute, and never much at once."""

from __future__ import annotations

import asyncio

BURST_S = 2.0  # an idle bucket holds what two seconds bring


class TokenBucket:
    """Hands out amounts at a rate, first come, first served. Without a rate it never waits."""

    def __init__(self, per_minute: float | None) -> None:
        self._rate = None if per_minute is None else per_minute / 60
        self._level = 0.0 if self._rate is None else self._rate * BURST_S
        self._filled_at: float | None = None
        self._turn = asyncio.Lock()

    async def take(self, amount: float) -> None:
        """Wait until the amount is there. One larger than the bucket waits for as long as it takes to come."""
        if self._rate is None:
            return
        async with self._turn:
            self._fill()
            missing = amount - max(self._level, 0.0) if amount <= self._rate * BURST_S else 0.0
            wait_s = max(missing, -self._level) / self._rate
            if wait_s > 0:
                await asyncio.sleep(wait_s)
                self._fill()
            self._level -= amount

    def give_back(self, amount: float) -> None:
        """What was taken and not used; a negative amount takes more, which later ones wait for."""
        if self._rate is not None:
            self._level = min(self._level + amount, self._rate * BURST_S)

    def _fill(self) -> None:
        assert self._rate is not None
        now = asyncio.get_running_loop().time()
        if self._filled_at is not None:
            self._level = min(self._level + (now - self._filled_at) * self._rate, self._rate * BURST_S)
        self._filled_at = now
