"""The two ways a user's input can be wrong; the command line turns them into one line and an exit status."""

from __future__ import annotations

from typing import Literal

RejectKind = Literal[
    "missing_file",
    "unreadable_image",
    "absurd_image",
    "malformed_record",
    "no_answer",
    "image_count",
    "control_token",
    "inexact_labels",
    "too_long",
    "unsupervised",
]


class UsageError(ValueError):
    """A flag, a configuration value or a combination of them cannot work (exit status 2)."""


class DataError(ValueError):
    """An input file, record or checkpoint is missing, broken or contradicts itself (exit status 1).

    `kind` sorts the rejects of a dataset; None where the place that catches it knows the kind. `record` is the id.
    """

    def __init__(self, message: str, *, kind: RejectKind | None = None, record: str | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.record = record
