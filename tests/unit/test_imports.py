"""Imports flow one way and cost nothing until they are needed."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import anyres_vlm

PACKAGE = Path(anyres_vlm.__file__).parent
ROOT = "the package itself"  # `from anyres_vlm import __version__`: allowed everywhere

# A part of the package -> the parts that it may import, besides itself.
FOUNDATION = {"errors", "files", "geometry", "schema", "config"}
PARTS = {"data", "model", "checkpoints"}  # data and model never import each other
ALLOWED = {
    "errors": set(),
    "files": set(),
    "geometry": {"errors"},
    "schema": {"errors", "geometry"},
    "config": {"errors", "files", "geometry"},
    "synthetic": FOUNDATION,
    "data": FOUNDATION,
    "model": FOUNDATION,
    "checkpoints": FOUNDATION | {"data", "model"},
    "inference": FOUNDATION | PARTS,
    "train": FOUNDATION | PARTS | {"synthetic"},
    "evaluate": FOUNDATION | PARTS | {"synthetic", "inference"},
    "serve": FOUNDATION | PARTS | {"inference"},
    "instruct": FOUNDATION | {"data"},
    "preflight": FOUNDATION | PARTS | {"inference", "train"},
    "ablate": FOUNDATION | {"synthetic", "train", "evaluate"},
    "cli": FOUNDATION
    | PARTS
    | {"synthetic", "inference", "train", "evaluate", "serve", "instruct", "preflight", "ablate"},
    "__main__": {"cli"},
}
ENGINE_LIBRARIES = {"accelerate", "deepspeed"}  # only train/engine/ knows them
HEAVY = ("torch", "transformers", "numpy")


def imported_modules(source: str) -> Iterator[str]:
    """Every module that a source names in an import, also in functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write the whole name"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_parts(source: str) -> set[str]:
    """The parts of this package that a source imports."""
    parts = set()
    for module in imported_modules(source):
        package, _, rest = module.partition(".")
        if package == "anyres_vlm":
            part = rest.partition(".")[0]
            parts.add(part if part in ALLOWED else ROOT if part in {"", "__version__"} else f"unknown {part}")
    return parts


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_flow_one_way(path: Path) -> None:
    part = part_of(path)
    assert part in ALLOWED, f"a new part {part}: say here what it may import"
    forbidden = imported_parts(path.read_text(encoding="utf-8")) - ALLOWED[part] - {part, ROOT}
    assert not forbidden, f"{part} may not import {sorted(forbidden)}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_engine_knows_the_parallel_libraries(path: Path) -> None:
    found = {module.partition(".")[0] for module in imported_modules(path.read_text(encoding="utf-8"))}
    assert not found & {"tools", "tests"}, "the package never imports its tools or tests"
    place = path.relative_to(PACKAGE)
    if place.parent != Path("train", "engine"):
        allowed = {"accelerate"} if place == Path("inference", "placement.py") else set()  # its device map
        assert not found & ENGINE_LIBRARIES - allowed, f"only train/engine/ imports {sorted(ENGINE_LIBRARIES)}"


def test_the_package_is_what_the_table_says() -> None:
    """Otherwise a part could be renamed and its rule checked no more."""
    present = {part_of(path) for path in SOURCES}
    assert present <= set(ALLOWED)
    assert {"errors", "geometry", "schema", "config", "data", "model", "train", "cli"} <= present


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("import anyres_vlm.model.vlm", {"model"}),
        ("from anyres_vlm import geometry", {"geometry"}),
        ("from anyres_vlm import __version__", {ROOT}),
        ("from anyres_vlm.data.images import open_image", {"data"}),
        ("def later():\n    from anyres_vlm.train import loop", {"train"}),
        ("if TYPE_CHECKING:\n    import anyres_vlm.serve.web as web", {"serve"}),
        ("import torch\nfrom pathlib import Path", set()),
        ("from anyres_vlm.elsewhere import thing", {"unknown elsewhere"}),
        ("from anyres_vlm import Assistant", {"unknown Assistant"}),  # which would hide where it is from
    ],
)
def test_every_form_of_import_is_seen(source: str, parts: set[str]) -> None:
    assert imported_parts(source) == parts


@pytest.mark.parametrize(
    "module", ["anyres_vlm", "anyres_vlm.geometry", "anyres_vlm.data.headers", "anyres_vlm.cli.main"]
)
def test_importing_is_light(module: str) -> None:
    script = f"import sys, {module}; print(*(name for name in {HEAVY!r} if name in sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == [], f"importing {module} imports {loaded.stdout}"
    assert loaded.stderr == ""


def test_the_public_surface_is_what_the_type_checker_sees() -> None:
    """Each name comes from the module that the block under TYPE_CHECKING imports it from."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    typed = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        typed |= {alias.name: node.module for alias in node.names}
    assert sorted(typed) == anyres_vlm.__all__
    for name, module in typed.items():
        assert getattr(anyres_vlm, name) is getattr(importlib.import_module(str(module)), name)
    assert set(anyres_vlm.__all__) <= set(dir(anyres_vlm))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = anyres_vlm.nothing
