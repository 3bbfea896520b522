"""Bootstrap intervals: pictures are drawn with replacement, each with all its questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000
AT_ONCE = 50  # draws; VQAv2's 40,504 pictures take 16 MB
COVERED = (2.5, 97.5)  # percentiles
ALIKE = 1e-9  # percent: what is equal but for rounding

Ratios = NDArray[np.float64]
"""Numerators and denominators of several ratios, (questions, ratios, 2); over draws of them (DRAWS, ratios, 2)."""


@dataclass(frozen=True)
class Interval:
    """The 95% interval of a value, in percent."""

    low: float
    high: float

    @property
    def margin(self) -> float:
        """Half its length."""
        return (self.high - self.low) / 2

    @property
    def has_zero(self) -> bool:
        """Whether a difference may be none."""
        return self.low <= 0 <= self.high


def draw(ratios: Ratios, units: Sequence[str], seed: int = 0) -> Ratios:
    """Sums of numerators and denominators over DRAWS samples of as many units, (DRAWS, ratios, 2).

    `units` names for each question what is drawn as a whole: its picture, or itself.
    """
    places = {unit: place for place, unit in enumerate(dict.fromkeys(units))}
    unit, count = [places[unit] for unit in units], len(places)
    columns = ratios.reshape(len(ratios), -1)
    by_unit = np.stack([np.bincount(unit, column, count) for column in columns.T], axis=1)
    rng = np.random.default_rng(seed)
    sums = np.concatenate([_times_drawn(rng, count) @ by_unit for _ in range(DRAWS // AT_ONCE)])
    return sums.reshape(DRAWS, *ratios.shape[1:])


def _times_drawn(rng: np.random.Generator, units: int) -> NDArray[np.float64]:
    """How often each unit is in each of some samples, (AT_ONCE, units)."""
    samples = [np.bincount(rng.integers(units, size=units), minlength=units) for _ in range(AT_ONCE)]
    return np.array(samples, np.float64)


def shares(sums: Ratios) -> NDArray[np.float64]:
    """Each ratio in percent, (..., ratios, 2) -> (..., ratios); not a number where nothing is divided."""
    with np.errstate(invalid="ignore", divide="ignore"):
        quotients: NDArray[np.float64] = 100 * sums[..., 0] / sums[..., 1]
    return quotients


def interval(draws: NDArray[np.float64]) -> Interval | None:
    """The percentile interval of drawn values, (DRAWS,); None where all draws are alike, which says nothing."""
    known = draws[np.isfinite(draws)]
    if not len(known) or np.ptp(known) < ALIKE:
        return None
    low, high = np.percentile(known, COVERED)
    return Interval(float(low), float(high))
