"""One command of several benchmarks: each module has a docstring, `add_arguments`, `run` and `show`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from types import ModuleType


def main(description: str | None, benchmarks: Mapping[str, ModuleType]) -> None:
    """Run the benchmark that the command line names and print its figures, or with `--json` one object."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, module in benchmarks.items():
        assert module.__doc__ is not None, "its first line is the help"
        command = commands.add_parser(name, help=module.__doc__.splitlines()[0])
        command.add_argument("--json", action="store_true", help="print the figures as one JSON object")
        module.add_arguments(command)
    arguments = parser.parse_args()
    benchmark = benchmarks[arguments.benchmark]
    figures = benchmark.run(arguments)
    if arguments.json:
        json.dump(figures, sys.stdout, indent=2)
        print()
    else:
        benchmark.show(figures)
