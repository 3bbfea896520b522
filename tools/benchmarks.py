"""One command of several benchmarks: each module has a docstring, `add_arguments`, `run`, `show` and `QUICK`.

What `run` returns has `ratios`: by name, ours to a peer's in each round, where more is better. `QUICK` are the smaller
sizes of `--quick`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any


def main(description: str | None, benchmarks: Mapping[str, ModuleType]) -> None:
    """Run the benchmark that the command line names and print its figures, or with `--json` one object."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, module in benchmarks.items():
        assert module.__doc__ is not None, "its first line is the help"
        command = commands.add_parser(name, help=module.__doc__.splitlines()[0])
        command.add_argument("--json", action="store_true", help="print the figures as one JSON object")
        add_quick(command, module.QUICK)
        module.add_arguments(command)
    arguments = parser.parse_args()
    benchmark = benchmarks[arguments.benchmark]
    figures = benchmark.run(arguments)
    if arguments.json:
        json.dump(figures, sys.stdout, indent=2)
        print()
    else:
        benchmark.show(figures)


def add_quick(parser: argparse.ArgumentParser, sizes: Mapping[str, Any]) -> None:
    """The flag `--quick`, which sets arguments whatever else the command line says of them before it."""

    class Quick(argparse.Action):
        def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: Any = None) -> None:
            vars(namespace).update(sizes)

    said = ", ".join(f"{name} {size}" for name, size in sizes.items())
    parser.add_argument("--quick", nargs=0, action=Quick, help=f"smaller: {said}", default=argparse.SUPPRESS)


def of_peer(peer: Sequence[float], ours: Sequence[float]) -> list[float]:
    """How many times as fast, or as small, as a peer we were in each round."""
    return [theirs / own for theirs, own in zip(peer, ours, strict=True)]
