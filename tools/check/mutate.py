#!/usr/bin/env python3
"""Mutation testing: plant small faults in a module, one at a time, and check whether its tests find them.

    tools/check/mutate.py loss                  all faults in the module of the loss
    tools/check/mutate.py packing --sample 200  this many faults in the modules of the planner, drawn by a seed

Faults come from cosmic-ray (extra mutation); operators are only replaced by + - * //, and faults in type annotations
are left out, as they change nothing at run time. No file is changed: every fault is imported from memory in a separate
process, forked when the libraries are already loaded, with an empty cache for numba. Prints the score and the
survivors.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib.machinery
import importlib.util
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = "tests/unit/data"
TARGETS = {  # modules, and their tests
    "geometry": (["anyres_vlm/geometry.py"], ["tests/unit/test_geometry.py"]),
    "labels": (
        ["anyres_vlm/data/conversation.py"],
        [f"{DATA}/test_{name}.py" for name in ("conversation", "templates", "chat_template")],
    ),
    "packing": (
        [f"anyres_vlm/data/packing/{name}.py" for name in "balance bound cost fill plan".split()],
        [f"{DATA}/test_packing_{name}.py" for name in ("cost", "bound", "plan")],
    ),
    "loss": (["anyres_vlm/model/loss.py"], ["tests/unit/model/test_loss.py"]),
}
ARITHMETIC = ("_Add", "_Sub", "_Mul", "_FloorDiv")  # replacements; others, such as **, are found too easily
MODELS = ("transformers.models.clip.modeling_clip", "transformers.models.llama.modeling_llama")
LIBRARIES = ("hypothesis", "numba", "pyarrow.parquet", "torchvision", *MODELS)  # loaded once for all tests
SURVIVED, KILLED, TIMED_OUT = "survived", "killed", "timed out"


def mutants(source: str) -> Iterator[str]:
    """Yield every changed source once, without those that run the same code."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.operators.provider import OperatorProvider

    provider, seen, nodes = OperatorProvider(), {_runnable(source)}, list(ast_nodes(get_ast(source)))
    for name in provider:
        if provider[name].arguments() or (name.startswith("ReplaceBinary") and not name.endswith(ARITHMETIC)):
            continue
        operator = provider[name]()
        places = sum(1 for node in nodes for _ in operator.mutation_positions(node))
        for place in range(places):
            changed = mutate_code(source, operator, place)
            if changed is not None and (runnable := _runnable(changed)) not in seen:
                seen.add(runnable)
                yield changed


def _runnable(source: str) -> str:
    """Return the syntax tree without annotations, as text. Source that is not valid Python is returned unchanged."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return source
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign):
            node.annotation = ast.Constant(None)
        elif isinstance(node, ast.FunctionDef):
            node.returns = None
    return ast.dump(tree)


class Mutant(importlib.machinery.SourceFileLoader):
    """Finds and loads one module from changed source."""

    def __init__(self, path: str, source: str) -> None:
        self.module = path.removesuffix(".py").replace("/", ".")
        super().__init__(self.module, str(ROOT / path))
        self.source = source

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        """Find the module, as a finder on `sys.meta_path`."""
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.module else None

    def get_code(self, fullname: str) -> CodeType:
        """Return the code of the changed source instead of the file."""
        return compile(self.source, self.path, "exec")


def test(path: str, source: str, tests: list[str], limit_s: float) -> str:
    """Run the tests on the changed module in a separate process. Returns the outcome."""
    with tempfile.TemporaryDirectory() as cache:
        process = multiprocessing.get_context("fork").Process(target=_pytest, args=(path, source, tests, cache))
        process.start()
        process.join(limit_s)
        if process.is_alive():
            process.kill()
            process.join()
            return TIMED_OUT
        return KILLED if process.exitcode else SURVIVED


def _pytest(path: str, source: str, tests: list[str], cache: str) -> None:
    import numba

    numba.config.CACHE_DIR = cache  # the usual cache identifies a function by the time of its file
    sys.meta_path.insert(0, Mutant(path, source))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])
    os._exit(int(status))


def run(target: str, sample: int | None, seed: int) -> dict[str, Any]:
    """Test the mutants of a target. Raises `SystemExit` if its tests fail without a fault."""
    modules, tests = TARGETS[target]
    sources = {path: (ROOT / path).read_text(encoding="utf-8") for path in modules}
    started = time.monotonic()
    if test(modules[0], sources[modules[0]], tests, 600) != SURVIVED:
        raise SystemExit(f"{target}: its tests fail without a fault: pytest {' '.join(tests)}")
    limit_s = 5 + 4 * (time.monotonic() - started)
    every = [(path, changed) for path, source in sources.items() for changed in mutants(source)]
    drawn = every if sample is None else random.Random(seed).sample(every, min(sample, len(every)))
    counts, survivors = dict.fromkeys((KILLED, TIMED_OUT, SURVIVED), 0), []
    for number, (path, changed) in enumerate(drawn, 1):
        counts[outcome := test(path, changed, tests, limit_s)] += 1
        if outcome == SURVIVED:
            survivors.append(_difference(path, sources[path], changed))
            print(survivors[-1], file=sys.stderr)
        if number % 50 == 0:
            print(f"{target}: {number} of {len(drawn)}, {counts[SURVIVED]} survived", file=sys.stderr)
    score = 1 - counts[SURVIVED] / len(drawn)
    seconds = round(time.monotonic() - started)
    return {"target": target, "all": len(every), **counts, "score": score, "seconds": seconds, "survivors": survivors}


def _difference(path: str, source: str, changed: str) -> str:
    """Return file, line and the changed lines."""
    lines = list(difflib.unified_diff(source.splitlines(), changed.splitlines(), n=0, lineterm=""))
    return "\n".join([f"{path} {lines[2]}", *lines[3:]])


def main() -> None:
    """Print one line per target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="*", choices=[[], *TARGETS], help="default: all")
    parser.add_argument("--sample", type=int, metavar="N", help="N faults of each target instead of all")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON list")
    given = parser.parse_args()
    os.chdir(ROOT)
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    sys.path.insert(0, str(ROOT))
    for library in LIBRARIES:
        importlib.import_module(library)
    figures = [run(target, given.sample, given.seed) for target in given.target or TARGETS]
    if given.json:
        print(json.dumps(figures, indent=1))
        return
    for row in figures:
        tested = row[KILLED] + row[TIMED_OUT] + row[SURVIVED]
        print(f"{row['target']:9} {tested:5} of {row['all']} faults, {row[SURVIVED]} survived: {row['score']:.1%}")
        print("\n".join(row["survivors"]))


if __name__ == "__main__":
    main()
