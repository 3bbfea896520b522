#!/usr/bin/env python3
"""Benchmarks of the data layer, each side by side with what it is compared with, in one run.

    tools/bench_data.py tiling            JPEG bytes to tiles, against transformers' two LlavaNext processors
    tools/bench_data.py plan              a million samples packed, against next fit and first fit
    tools/bench_data.py index             headers and text of 100,000 images, against the bare calls

`--json` prints the figures as one object; each has its own options, see `tools/bench_data.py plan --help`.
"""

from __future__ import annotations

import argparse
import json
import sys

import bench_indexing
import bench_packing
import bench_tiling

BENCHMARKS = {"tiling": bench_tiling, "plan": bench_packing, "index": bench_indexing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, module in BENCHMARKS.items():
        command = commands.add_parser(name, help=module.__doc__.splitlines()[0])
        command.add_argument("--json", action="store_true", help="print the figures as one JSON object")
        module.add_arguments(command)
    arguments = parser.parse_args()
    benchmark = BENCHMARKS[arguments.benchmark]
    figures = benchmark.run(arguments)
    if arguments.json:
        json.dump(figures, sys.stdout, indent=2)
        print()
    else:
        benchmark.show(figures)


if __name__ == "__main__":
    main()
