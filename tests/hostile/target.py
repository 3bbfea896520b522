"""What is fuzzed: a way to make inputs and a check of what the project does with one."""

from __future__ import annotations

import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis.strategies import SearchStrategy
from watch import watched


@dataclass(frozen=True)
class Target:
    """`check` gets an input and an empty folder: True for accepted, False for a clean refusal; a fault raises."""

    inputs: SearchStrategy[Any]
    check: Callable[[Any, Path], bool]
    coverage: bool = False  # the inputs are bytes for a parser of our own: atheris can guide itself by its branches


class TimeUp(KeyboardInterrupt):
    """Ends Hypothesis, which takes any other exception for a failure of the test."""


@dataclass
class Tally:
    """What became of the inputs."""

    accepted: int = 0
    rejected: int = 0
    failures: int = 0
    faults: dict[str, str] = field(default_factory=dict)  # type and place of each -> its first message and input

    @property
    def tried(self) -> int:
        return self.accepted + self.rejected + self.failures

    def add(self, target: Target, value: Any) -> None:
        """Try one input under the watch; a fault is counted, not raised."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            with self.counting(value) as outcome, watched(folder):
                outcome.append(target.check(value, folder))

    @contextmanager
    def counting(self, value: Any) -> Iterator[list[bool]]:
        """Count what the block appends as its outcome, or what it raises."""
        outcome: list[bool] = []
        try:
            yield outcome
        except Exception as error:
            self.failures += 1
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"
            self.faults.setdefault(place, f"{str(error)[:300]} of {value!r}")
        else:
            self.accepted += sum(outcome)
            self.rejected += len(outcome) - sum(outcome)


def explore(target: Target, examples: int, seconds: float = float("inf"), fixed: bool = False) -> Tally:
    """The outcomes of up to `examples` inputs from Hypothesis, the same each time if `fixed`."""
    tally, end = Tally(), time.monotonic() + seconds

    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        derandomize=fixed,
        verbosity=Verbosity.quiet,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(target.inputs)
    def try_one(value: Any) -> None:
        if time.monotonic() > end:
            raise TimeUp
        tally.add(target, value)

    with suppress(TimeUp):
        try_one()
    return tally
