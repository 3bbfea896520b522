"""Forward and backward of one stage-2 pass, compared with stock LlavaNext, padded and packed.

Run as `tools/bench/step.py pass`, in fp32 on the CPU with the encoder frozen. The methods alternate in one process and
their medians are compared. Peak memory is measured in a separate process for each method: the growth of the resident
set over the loaded model and its batches, gradients included, with freed blocks returned to the system at once.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from common import of_peer, peak_mb
from step_ways import OURS, SHAPES, STOCK, Pass, Ways

LOSS_RTOL, GRADIENT_RTOL = 1e-5, 1e-4  # relative; for a gradient, to its largest entry
QUICK = {"samples": 8, "runs": 3}
TARGETS = {"wide_vocab": (5.0, 6.0, 5.0), "like_7b": (1.25, 1.6, 2.0)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--shape", choices=sorted(SHAPES), action="append", help="only this shape; may be repeated")
    parser.add_argument("--samples", type=int, default=48, help="samples of the pass, a multiple of 8")
    parser.add_argument("--runs", type=int, default=5, help="alternating runs; medians are compared")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads, for every method")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Check for each shape that all methods are equal, then measure time and memory."""
    torch.set_num_threads(arguments.threads)
    shapes = {name: _measure(name, arguments) for name in arguments.shape or SHAPES}
    settings = {key: getattr(arguments, key) for key in ("samples", "runs", "seed", "threads")}
    return {**settings, "torch": torch.__version__, "shapes": shapes, "ratios": _ratios(shapes)}


def _ratios(shapes: dict[str, Any]) -> dict[str, list[float]]:
    """Return the ratios of time per round and of peak memory, of every method to ours."""
    found = {}
    for shape, result in shapes.items():
        ours = result["ways"][OURS]
        for name in STOCK:
            row = result["ways"][name]
            found[f"{shape}, {name}, speed"] = of_peer(row["seconds"], ours["seconds"])
            found[f"{shape}, {name}, memory"] = of_peer([row["peak_mb"]], [ours["peak_mb"]])
    return found


def _measure(shape: str, arguments: argparse.Namespace) -> dict[str, Any]:
    names = [OURS, *STOCK]
    ways = Ways(shape, arguments.samples, arguments.seed, names)
    rows = differences(ways, names)  # also warms up
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(arguments.runs):
        for name in names:
            start = time.perf_counter()
            ways.passes[name]()
            seconds[name].append(time.perf_counter() - start)
    tokens = sum(sample.length for sample, _ in ways.samples)
    visual = sum(plan.total_tokens for sample, _ in ways.samples for plan in sample.plans)
    for name, target in zip(names, (1.0, *TARGETS[shape]), strict=True):
        median = statistics.median(seconds[name])
        rows[name] |= {
            "tokens_per_s": tokens / median,
            "ratio": median / statistics.median(seconds[OURS]),
            "target": target,
            "seconds": seconds[name],
            "peak_mb": peak_mb(_prepare, name, shape, arguments.samples, arguments.seed, arguments.threads),
        }
    return {
        "tokens": tokens,
        "visual_share": visual / tokens,
        "supervised_share": ways.supervised / tokens,
        "ways": rows,
        "memory_is_least": rows[OURS]["peak_mb"] <= min(rows[name]["peak_mb"] for name in STOCK),
    }


def differences(ways: Ways, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return how far loss and gradients of each method are from ours. Fails above the tolerances."""
    loss, gradients = ways.passes[OURS](), ways.gradients(OURS)
    found = {}
    for name in names:
        other = ways.passes[name]()
        theirs = ways.gradients(name)
        assert theirs.keys() == gradients.keys(), f"{name} differs in {sorted(theirs.keys() ^ gradients.keys())[:3]}"
        furthest = max(float((theirs[key] - value).abs().max() / value.abs().max()) for key, value in gradients.items())
        found[name] = {"loss": other, "loss_differs": abs(other / loss - 1), "gradients_differ": furthest}
        assert abs(other / loss - 1) < LOSS_RTOL, f"{name}: loss {other}, ours {loss}"
        assert furthest < GRADIENT_RTOL, f"{name}: gradients differ by {furthest}"
    return found


def _prepare(name: str, shape: str, samples: int, seed: int, threads: int) -> Pass:
    torch.set_num_threads(threads)
    return Ways(shape, samples, seed, [name]).passes[name]


def show(result: dict[str, Any]) -> None:
    """Print one table per shape."""
    print(
        f"{result['samples']} samples, medians of {result['runs']} alternating runs, {result['threads']} threads, "
        f"fp32, torch {result['torch']}"
    )
    for shape, found in result["shapes"].items():
        print(
            f"\n{shape}: {found['tokens']:,} tokens, {found['visual_share']:.1%} visual, "
            f"{found['supervised_share']:.1%} supervised"
        )
        print("method                   tokens/s   anyres is  target  peak MB  loss differs  gradients differ")
        for name, row in found["ways"].items():
            print(
                f"{name:24} {row['tokens_per_s']:8,.0f}  {row['ratio']:8.2f} x  {row['target']:6.2f}  "
                f"{row['peak_mb']:7,.0f}  {row['loss_differs']:12.1e}  {row['gradients_differ']:16.1e}"
            )
    print(f"\nloss equal within {LOSS_RTOL:g}, gradients within {GRADIENT_RTOL:g} of a parameter's largest entry")
