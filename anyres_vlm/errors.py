"""Errors that end a command with one line and an exit status, and the words for what is wrong with a value."""

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


SHOWN = 200  # characters of a value in an error message


def did_you_mean(word: object, known: Sequence[str]) -> str:
    """Return the end of an error message with the most similar known word, or an empty string."""
    near = difflib.get_close_matches(str(word), known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def shortened(value: object) -> str:
    """Return the representation of a value, shortened for an error message."""
    try:
        text = repr(value)
    except ValueError:  # Python prints at most 4300 digits
        return "a number with thousands of digits"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Describe the first few errors on one line, unknown keys first, as a typo may be why another key is missing."""
    faults = []
    told = [fault for fault in error.errors() if fault["type"] != "default_factory_not_called"]  # follows from another
    for fault in sorted(told, key=lambda fault: fault["type"] != "extra_forbidden")[:3]:
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
    """Return the keys of the model at this location, inside models, mappings and tuples."""
    kind: Any = model
    for part in location:
        kind = kind.model_fields[part].annotation if hasattr(kind, "model_fields") else _entry(kind)
        while get_origin(kind) in (Annotated, Union, UnionType):
            kind = next(kind for kind in get_args(kind) if kind is not NoneType)
    return list(kind.model_fields)


def _entry(kind: Any) -> Any:
    return get_args(kind)[1 if get_origin(kind) is dict else 0]
