#!/usr/bin/env python
"""Feed hostile input to everything that reads files, and count the outcomes.

    python tools/check/fuzz.py --examples 20000                 # per target, or as many as fit into 60 s
    python tools/check/fuzz.py --only JPEG --seconds 600 --json

The targets are those of tests/hostile: every module there that defines `TARGETS`. Hypothesis makes the inputs. If the
project's own parser reads the bytes and the extra `fuzz` is installed, libFuzzer (atheris) continues in a separate
process with inputs that reach new branches. Prints the first input of each fault; the exit status is 1 if a target
fails.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

HOSTILE = Path(__file__).resolve().parents[2] / "tests" / "hostile"
sys.path.insert(0, str(HOSTILE))

from target import Tally, Target, explore  # noqa: E402


def find_targets() -> dict[str, Target]:
    """Return the targets of all modules by name."""
    targets: dict[str, Target] = {}
    for path in sorted(HOSTILE.glob("*.py")):
        if not path.stem.startswith("test_"):
            targets |= getattr(importlib.import_module(path.stem), "TARGETS", {})
    return targets


def cover(name: str, seconds: float) -> Tally:
    """Run libFuzzer on a target in a child process and return its tally."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tally.json"
        command = [sys.executable, __file__, "--child", name, "--seconds", str(seconds), "--report", str(report)]
        child = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if not report.exists():
            return Tally(failures=1, faults={f"child ended with {child.returncode}": child.stderr[-2000:]})
        return Tally(**json.loads(report.read_text(encoding="utf-8")))


def be_child(target: Target, seconds: float, report: Path) -> None:
    """Fuzz one target, guided by the branches of the project's modules, and write the tally."""
    import atheris

    tally, end = Tally(), time.monotonic() + seconds
    atheris.instrument_func(target.check)
    for module in [module for name, module in sys.modules.items() if name.startswith("anyres_vlm.data")]:
        for value in vars(module).values():
            if callable(value) and getattr(value, "__module__", None) == module.__name__ and hasattr(value, "__code__"):
                atheris.instrument_func(value)

    def try_one(data: bytes) -> None:
        with tally.counting(data) as outcome:  # libFuzzer limits time and memory itself
            outcome.append(target.check(data, folder))
        if time.monotonic() > end:
            report.write_text(json.dumps(asdict(tally)), encoding="utf-8")
            sys.exit(0)

    corpus, folder = Path("corpus"), Path.cwd()
    corpus.mkdir()
    seeds: list[bytes] = []
    explore(Target(target.inputs, lambda value, folder: bool(seeds.append(value))), 200)
    for number, seed in enumerate(seeds):
        (corpus / str(number)).write_bytes(seed)
    atheris.Setup([sys.argv[0], "corpus", "-max_len=4096", "-timeout=20", "-rss_limit_mb=3072"], try_one)
    atheris.Fuzz()


def show(tallies: dict[str, Tally], seconds: float) -> None:
    """Print the table, then the faults."""
    print(f"{'target':<34}{'inputs':>10}{'rejected':>10}{'accepted':>10}{'failures':>10}")
    for name, tally in tallies.items():
        print(f"{name:<34}{tally.tried:>10,}{tally.rejected:>10,}{tally.accepted:>10,}{tally.failures:>10,}")
    total = sum(tally.tried for tally in tallies.values())
    print(f"{total:,} inputs in {seconds:,.0f} s")
    for name, tally in tallies.items():
        for place, words in tally.faults.items():
            print(f"\n{name}: {place}: {words[:2000]}")


def main() -> int:
    """Fuzz the chosen targets one after the other. Returns 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1000, help="inputs from Hypothesis per target")
    parser.add_argument("--seconds", type=float, default=60.0, help="time per target, and the same again for libFuzzer")
    parser.add_argument("--only", default="", help="only targets whose name contains this")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # rejects are counted here instead
    targets = find_targets()
    if args.child is not None:
        be_child(targets[args.child], args.seconds, args.report)
        return 0
    began = time.monotonic()
    tallies: dict[str, Tally] = {}
    for name, target in targets.items():
        if args.only.lower() not in name.lower():
            continue
        print(f"{name} ...", file=sys.stderr)
        tallies[name] = explore(target, args.examples, args.seconds)
        if target.coverage and find_spec("atheris"):
            tallies[f"{name}, by coverage"] = cover(name, args.seconds)
    if not tallies:
        parser.error(f"--only {args.only!r}: no target has it in its name; the targets are {', '.join(targets)}")
    if args.json:
        print(json.dumps({name: asdict(tally) for name, tally in tallies.items()}, indent=2))
    else:
        show(tallies, time.monotonic() - began)
    return int(any(tally.failures for tally in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
