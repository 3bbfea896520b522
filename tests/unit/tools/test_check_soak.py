"""The soak's arithmetic on made-up series: what leaks or slows down is flagged, noise is not."""

from __future__ import annotations

import random

import pytest
import soak

STEPS, WARM_UP = 2000, 200


def judge(
    leak_mb: float = 0.0, slower: float = 0.0, lost_files: int = 0, left: int = 0, busy: bool = False
) -> list[str]:
    """Failures of a run that begins with 1,000 MB behind a warm-up that allocates, and noise of 1% and 20%."""
    rng = random.Random(0)
    samples, step_s, cpu_s = [], [], 0.0
    for step in range(1, STEPS + 1):
        part = step / STEPS
        cpu_s += 0.2 * (1 + slower * part) * rng.uniform(0.8, 1.2)
        held = (500 if step < WARM_UP else 1000) + leak_mb * part + rng.gauss(0, 10)
        for rank in range(2):
            leaks = held if rank == 1 else 1000 + rng.gauss(0, 10)
            samples.append(soak.Sample(step, rank, leaks, 40 + int(lost_files * part) + (step % 50 == 0), cpu_s))
        step_s.append(0.4 if busy and part > 0.5 else 0.2)
    return soak.judge(samples, step_s, WARM_UP, left)["failures"]


@pytest.mark.parametrize("steady", [{}, {"leak_mb": 10}, {"leak_mb": -100}, {"slower": -0.2}, {"busy": True}])
def test_noise_and_what_shrinks_pass(steady: dict[str, float]) -> None:
    assert judge(**steady) == []


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"leak_mb": 40}, "rank 1: memory grew by 3."),
        ({"slower": 0.1}, "rank 0: CPU time per step grew by "),
        ({"lost_files": 3}, "rank 0: 40 files open at first, 42 at the end"),
        ({"left": 2}, "2 processes outlived the run"),
    ],
)
def test_what_grows_is_named(fault: dict[str, float], said: str) -> None:
    assert any(line.startswith(said) for line in judge(**fault))


def test_a_short_run_is_refused() -> None:
    with pytest.raises(ValueError, match="9 values after the warm-up, 10 are needed"):
        soak.tenths([1.0] * 9)


def test_cpu_time_is_that_of_the_steps_in_each_part() -> None:
    samples = [soak.Sample(step, 0, 1.0, 1, step * (0.1 if step <= 50 else 0.2)) for step in range(0, 101, 5)]
    parts = soak.cpu_tenths(samples)
    assert parts[:5] == pytest.approx([0.1] * 5)
    assert parts[6:] == pytest.approx([0.2] * 4)
    with pytest.raises(ValueError, match="steps 0 to 5 are too few"):
        soak.cpu_tenths(samples[:2])
