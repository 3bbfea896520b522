"""What ends a command early; the command line turns each into one line and an exit status."""

from __future__ import annotations

from typing import Literal

RejectKind = Literal[
    "missing_file",
    "unreadable_image",
    "absurd_image",
    "malformed_record",
    "no_answer",
    "image_count",
    "remote_image",
    "video",
    "audio",
    "tools",
    "system",
    "control_token",
    "inexact_labels",
    "too_long",
    "unsupervised",
]


LONGEST_LINE = 2000  # characters of an error; a library's list of all it knows may have more


class UsageError(ValueError):
    """A flag, a configuration value or a combination of them cannot work (exit status 2)."""


class DataError(ValueError):
    """An input file, record or checkpoint is missing, broken or contradicts itself (exit status 1).

    `kind` sorts the rejects of a dataset; None where the place that catches it knows the kind. `record` is the id.
    """

    def __init__(self, message: str, *, kind: RejectKind | None = None, record: str | None = None) -> None:
        line = " ".join(message.splitlines())  # whatever a file's names hold
        super().__init__(line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}...")
        self.kind = kind
        self.record = record


class RankLost(ConnectionError):
    """Another rank of the run has ended or does not answer (exit status 1)."""


class Interrupted(Exception):
    """A signal asked a run to leave; it has saved its state and goes on when it is started again (exit status 75)."""
