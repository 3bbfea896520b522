"""What a check found, in a line, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

Level = Literal["ok", "warn", "fail"]
Subject = TypeVar("Subject")
# What broken installations, drivers, disks and data raise; errors of this package are among them.
BROKEN = (ImportError, OSError, RuntimeError, ValueError, AttributeError)


@dataclass(frozen=True)
class Finding:
    """One line of the report; `remedy` is empty where nothing has to be done."""

    check: str
    level: Level
    found: str
    remedy: str = ""


def judge(check: str, is_good: bool, found: str, remedy: str) -> Finding:
    """A finding that is ok or fails."""
    return Finding(check, "ok", found) if is_good else Finding(check, "fail", found, remedy)


def run_checks(checks: Mapping[str, Callable[[Subject], Iterable[Finding]]], subject: Subject) -> Iterator[Finding]:
    """Every check's findings in order; a check that breaks is a finding itself."""
    for name, check in checks.items():
        try:
            yield from check(subject)
        except BROKEN as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            yield Finding(name, "fail", reason, "" if isinstance(error, ValueError) else f"mend this first ({name})")


def gigabytes(size: float) -> str:
    """Bytes in words, 10^9 a GB."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"
