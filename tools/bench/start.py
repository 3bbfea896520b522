#!/usr/bin/env python3
"""Start-up time of common commands, compared with Python doing nothing: medians over fresh processes.

Runs alternate, so that other load on the machine affects all commands equally. CPU time is user and system time of the
process and its children; on a busy machine it is more reliable than the wall clock.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import add_quick, of_peer

ROOT = Path(__file__).resolve().parents[2]
HELP_LIMIT_S, COUNT_LIMIT_S = 0.4, 0.25  # wall clock, on a machine with an idle core


def commands(image: Path) -> dict[str, tuple[list[str], float | None]]:
    """Return the commands by name, each with its time limit in seconds."""
    return {
        "python -c pass": ([sys.executable, "-c", "pass"], None),
        "anyres --help": ([sys.executable, "-m", "anyres_vlm", "--help"], HELP_LIMIT_S),
        "tools/count_tokens.py IMAGE": (
            [sys.executable, str(ROOT / "tools/count_tokens.py"), str(image)],
            COUNT_LIMIT_S,
        ),
    }


def measure(command: Sequence[str]) -> tuple[float, float]:
    """Return wall and CPU seconds of one process. Raises `CalledProcessError` if it fails."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": path})
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def run(runs: int, image: Path) -> dict[str, Any]:
    """Return `commands`, with median and least wall and CPU seconds, and `ratios`.

    The first process of each command fills caches and is not counted. `ratios` has the CPU time of Python doing nothing
    divided by that of the command, one value per round.
    """
    table = commands(image)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in table}
    for _ in range(runs + 1):
        for name, (command, _) in table.items():
            taken[name].append(measure(command))
    figures: dict[str, dict[str, float | None]] = {}
    for name, (_, limit) in table.items():
        wall, cpu = zip(*taken[name][1:], strict=True)
        figures[name] = {
            "wall_s": statistics.median(wall),
            "cpu_s": statistics.median(cpu),
            "least_wall_s": min(wall),
            "least_cpu_s": min(cpu),
            "limit_s": limit,
        }
    bare, *others = taken
    cpu_s = {name: [cpu for _, cpu in rows[1:]] for name, rows in taken.items()}
    return {"commands": figures, "ratios": {name: of_peer(cpu_s[bare], cpu_s[name]) for name in others}}


def main() -> None:
    """Print a table, or with `--json` one object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9, help="processes per command")
    parser.add_argument("--image", type=Path, help="image to count (default: a generated JPEG of 640x480)")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    add_quick(parser, {"runs": 5})
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        image = arguments.image
        if image is None:
            from PIL import Image  # only used here

            image = Path(folder) / "image.jpg"
            Image.new("RGB", (640, 480)).save(image)
        figures = run(arguments.runs, image)
    if arguments.json:
        print(json.dumps(figures, indent=2))
        return
    print(f"{'median (least) of ' + str(arguments.runs):<30}{'wall s':>16}{'CPU s':>16}{'limit':>8}")
    for name, row in figures["commands"].items():
        columns = "".join(f"{row[f'{clock}_s']:>8.3f} ({row[f'least_{clock}_s']:.3f})" for clock in ("wall", "cpu"))
        print(f"{name:<30}{columns}{row['limit_s'] or '':>8}")


if __name__ == "__main__":
    main()
