"""Sizes and modification times of a source's files, to recognise an unchanged source without reading it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyres_vlm.data.sources import source_files


@dataclass(frozen=True, slots=True)
class Stamp:
    """Names, sizes in bytes and modification times in ns of the files of a source."""

    look: dict[str, Any]

    @classmethod
    def take(cls, data: Path, images: Path | None) -> Stamp:
        """Take the stamp of a source without opening its files. Raises `DataError` if a file is missing."""
        stats = {str(path.resolve()): path.stat() for path in source_files(data)}
        look = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
        return cls({"images": None if images is None else str(images.resolve()), "files": look})

    def known_fingerprint(self, target: Path) -> str | None:
        """Return the fingerprint that the last run saved for this target, if the stamp is unchanged."""
        try:
            noted = json.loads(_note(target).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return str(noted["fingerprint"]) if noted["look"] == self.look else None

    def save(self, target: Path, fingerprint: str) -> None:
        """Save stamp and fingerprint for the next run."""
        _note(target).write_text(json.dumps({"look": self.look, "fingerprint": fingerprint}), encoding="utf-8")


def _note(target: Path) -> Path:
    return target.with_name(f".{target.name}.source.json")
