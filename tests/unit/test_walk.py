"""The walk through the code leads along files and names that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import anyres_vlm

PACKAGE = Path(anyres_vlm.__file__).parent
WORD = re.compile(r"`([^`\n]+)`")
PLAIN = {"anyres", "capacity", "image_newline"}  # words, not names of a file


def names_of(path: Path) -> set[str]:
    """What a module defines or imports at its top, and `Class.method`."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
            inner = node.body if isinstance(node, ast.ClassDef) else []
            names |= {f"{node.name}.{one.name}" for one in inner if isinstance(one, ast.FunctionDef)}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def missing(text: str) -> list[str]:
    """The files that are not there, and names that none of their paragraph's files has."""
    wrong = []
    for paragraph in re.split(r"\n\n|\n(?=\d+\. )", text):
        words = WORD.findall(paragraph)
        files = [word for word in words if word.endswith(".py")]
        paths = [path for file in files for path in (PACKAGE / file, PACKAGE.parent / file) if path.is_file()]
        wrong += [file for file in files if not (PACKAGE / file).is_file() and not (PACKAGE.parent / file).is_file()]
        known = PLAIN.union(*map(names_of, [*paths, PACKAGE / "schema.py", PACKAGE / "geometry.py"]))
        names = [word for word in words if re.fullmatch(r"[A-Za-z_]\w*(\.[a-z_]+)?", word) and word not in files]
        wrong += [name for name in names if name not in known and not (PACKAGE / name).exists() and "json" not in name]
        wrong += [word for word in words if word.endswith("/") and not (PACKAGE / word).is_dir()]
    return wrong


def test_every_file_and_name_exists() -> None:
    text = (PACKAGE / "README.md").read_text(encoding="utf-8")
    assert len(WORD.findall(text)) > 80
    assert missing(text) == []


def test_what_is_not_there_is_found() -> None:
    text = "1. `geometry.py`, `plan_tiles`, `plan_tile`, `TilePlan.canvas`\n2. `geometri.py`, `Engine.step`, `nowhere/`"
    assert missing(text) == ["plan_tile", "geometri.py", "Engine.step", "nowhere/"]
