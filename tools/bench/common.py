"""Command line of several benchmarks, each a module with a docstring, `add_arguments`, `run`, `show` and `QUICK`.

The result of `run` has `ratios`: for each name one value per round, ours compared with a peer's, where more is better.
`QUICK` has the smaller sizes of `--quick`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

M_MMAP_THRESHOLD = -3  # of glibc's mallopt


def main(description: str | None, benchmarks: Mapping[str, ModuleType]) -> None:
    """Run the benchmark named on the command line and print its figures, with `--json` as one object."""
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
    """Add the flag `--quick`, which overrides the same arguments where they come before it on the command line."""

    class Quick(argparse.Action):
        def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: Any = None) -> None:
            vars(namespace).update(sizes)

    shown = ", ".join(f"{name} {size}" for name, size in sizes.items())
    parser.add_argument("--quick", nargs=0, action=Quick, help=f"smaller sizes: {shown}", default=argparse.SUPPRESS)


def of_peer(peer: Sequence[float], ours: Sequence[float]) -> list[float]:
    """Return how many times as fast, or as small, as the peer we were in each round."""
    return [theirs / own for theirs, own in zip(peer, ours, strict=True)]


def peak_mb(prepare: Callable[..., Callable[[], Any]], *arguments: Any) -> float:
    """Run the work that `prepare(*arguments)` returns in a fresh process; return the peak growth of its memory in MB.

    Freed blocks of 64 kB and more go back to the system at once, so the peak is that of live tensors.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (prepare, arguments))


def _peak(prepare: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...]) -> float:
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    work = prepare(*arguments)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak that the kernel keeps
    before = _status("VmRSS")
    work()
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    """Return a memory figure of this process from the kernel, in kB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))
