"""Answers of an unfinished evaluation: one durable line a batch, each process its own file, all of them read together.

A line holds a whole batch, so that what a kill leaves is a number of whole batches: the rest is then batched as it
would have been, and every answer is the same to the bit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from anyres_vlm.durable import append, replacing
from anyres_vlm.errors import DataError


@dataclass(frozen=True)
class AnswerLog:
    """The logs of one benchmark in a folder. `key` stands for the model and the questions; other logs are not its."""

    folder: Path
    name: str
    key: str

    def path(self, shard: str) -> Path:
        """The log that the process of a shard, such as `1-of-4`, writes."""
        return self.folder / f"{self.name}.log.{shard}.jsonl"

    def read(self) -> dict[int, str | None]:
        """Answers by the question's place, of every shard of every earlier run; None could not be asked."""
        answers: dict[int, str | None] = {}
        for path in sorted(self.folder.glob(f"{self.name}.log.*.jsonl")):
            for batch in _batches(path, self.key):
                answers |= batch
        return answers

    def open(self, shard: str) -> None:
        """Make the log ready for appending: what a kill cut short is taken back, a log of another key is replaced."""
        path = self.path(shard)
        content = path.read_bytes() if path.exists() else b""
        header = _line({"key": self.key})
        if content.startswith(header):
            os.truncate(path, content.rindex(b"\n") + 1)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(path, "wb") as file:
            file.write(header)

    def append(self, shard: str, answers: Mapping[int, str | None]) -> None:
        """Add one batch, which is on the disk when this returns."""
        append(self.path(shard), _line({"answers": list(answers.items())}))


def _batches(path: Path, key: str) -> Iterator[dict[int, str | None]]:
    with path.open("rb") as file:
        if next(file, b"") != _line({"key": key}):
            return
        for line in file:
            if line.endswith(b"\n"):
                try:
                    yield dict(json.loads(line)["answers"])
                except (ValueError, KeyError, TypeError):
                    raise DataError(f"{path}: a line of it is broken: delete the file to answer anew") from None


def _line(entry: object) -> bytes:
    return json.dumps(entry).encode() + b"\n"
