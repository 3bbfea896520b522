"""Errors that end a command with one line and an exit status, and helpers to write their messages."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

if TYPE_CHECKING:  # start-up time
    from pydantic import BaseModel, ValidationError

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

LONGEST_LINE = 2000  # characters of an error message; a library's own may list every known name
SHOWN = 200  # characters of a value in an error message


class UsageError(ValueError):
    """Raised for a flag, a configuration value or a combination of them that cannot work (exit status 2)."""


class DataError(ValueError):
    """Raised for an input file, record or checkpoint that is missing, broken or inconsistent (exit status 1).

    `kind` is the category of a rejected record; None if the caller assigns it. `record` is the record's id.
    """

    def __init__(self, message: str, *, kind: RejectKind | None = None, record: str | None = None) -> None:
        line = " ".join(message.splitlines())  # names in a file may contain line breaks
        super().__init__(line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}...")
        self.kind = kind
        self.record = record


class RankLost(ConnectionError):
    """Raised if another rank of the run has exited or does not respond (exit status 1)."""


class Interrupted(Exception):
    """Raised after a signal, once the run has saved its state; rerun the command to resume (exit status 75)."""


def did_you_mean(word: object, known: Sequence[str]) -> str:
    """Return `; did you mean WORD?` with the most similar known word, to end an error message; else an empty string."""
    near = difflib.get_close_matches(str(word), known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def check_bad_records(bad: int, total: int, max_bad_fraction: float, details: str, remedy: str) -> None:
    """Raise `DataError` if more than `max_bad_fraction` of all records are bad, or all of them.

    The message contains the numbers, then `details` (which records, or of which kinds) and `remedy`.
    """
    if bad > max_bad_fraction * total:
        limit = f"more than max_bad_fraction={max_bad_fraction:g}"
    elif bad and bad == total:
        limit = "no samples remain"
    else:
        return
    raise DataError(f"{bad:,} of {total:,} records are bad ({details}), {limit}: {remedy}")


def shortened(value: object) -> str:
    """Return the `repr` of a value, shortened for an error message."""
    try:
        text = repr(value)
    except ValueError:  # Python prints at most 4300 digits
        return "a number with thousands of digits"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Describe the first three validation errors on one line.

    Unknown keys come first, because a misspelt key is often the reason why another one is missing.
    """
    faults = []
    # A factory is not called if a field it depends on is invalid, which is reported on its own.
    listed = [fault for fault in error.errors() if fault["type"] != "default_factory_not_called"]
    for fault in sorted(listed, key=lambda fault: fault["type"] != "extra_forbidden")[:3]:
        where = " ".join(".".join(str(part) for part in fault["loc"])[:SHOWN].split())
        if fault["type"] == "extra_forbidden":
            known = _fields(model, fault["loc"][:-1])
            near = did_you_mean(fault["loc"][-1], known) or f"; known: {', '.join(known)}"
            faults.append(f"unknown key {where}{near}")
        elif fault["type"] == "missing":
            faults.append(f"key {where} is missing")
        else:
            choices = re.findall(r"'(.+?)'", str(fault.get("ctx", {}).get("expected", "")))
            near = did_you_mean(fault["input"], choices)
            faults.append(f"{where}: {fault['msg']}, got {shortened(fault['input'])}{near}" if where else fault["msg"])
    return "; ".join(faults)


def _fields(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """Return the keys of the model at a location, through nested models, mappings and tuples."""
    kind: Any = model
    for part in location:
        if hasattr(kind, "model_fields"):
            kind = kind.model_fields[part].annotation
        else:
            kind = get_args(kind)[1 if get_origin(kind) is dict else 0]  # of the values of a mapping or tuple
        while get_origin(kind) in (Annotated, Union, UnionType):
            kind = next(kind for kind in get_args(kind) if kind is not NoneType)
    return list(kind.model_fields)
