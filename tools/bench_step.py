#!/usr/bin/env python3
"""Benchmarks of the training step, each side by side with what it is compared with, in one run.

    tools/bench_step.py pass              forward and backward of stage 2, against stock LlavaNext padded and packed
    tools/bench_step.py loss              head and loss alone, against logits for every position

`--json` prints the figures as one object; each has its own options, see `tools/bench_step.py pass --help`.
"""

from __future__ import annotations

import argparse
import json
import sys

import bench_step_loss
import bench_step_pass

BENCHMARKS = {"pass": bench_step_pass, "loss": bench_step_loss}


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
