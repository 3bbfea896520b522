"""Head and loss only: ours on the supervised positions in chunks, compared with logits for every position.

Run as `tools/bench/step.py loss`. The dense method is the usual one: head over all positions, `float()`, cross-entropy
that ignores unsupervised positions, backward to the hidden states and to the weight of the head. Peak memory is the
growth of the resident set of a separate process, gradients included.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import of_peer, peak_mb
from torch import Tensor, nn

from anyres_vlm.model.loss import summed_loss
from anyres_vlm.schema import IGNORE_INDEX, supervision

QUICK = {"tokens": 4096}
ATOL = 1e-5  # of loss and gradients, relative to their largest entry


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--words", type=int, default=32_064)
    parser.add_argument("--hidden", type=int, default=256, help="width of the hidden states")
    parser.add_argument("--supervised", type=float, default=0.15, help="share of the tokens")
    parser.add_argument("--runs", type=int, default=5, help="alternating runs; medians are compared")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads, for both methods")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Check that both methods are equal, then measure time and memory."""
    torch.set_num_threads(arguments.threads)
    problem = Problem(arguments)
    differs = problem.difference()
    seconds: dict[str, list[float]] = {"anyres": [], "dense": []}
    for _ in range(arguments.runs):
        for name, times in seconds.items():
            start = time.perf_counter()
            problem.backward(name)
            times.append(time.perf_counter() - start)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    peak = {name: peak_mb(_prepare, arguments, name) for name in seconds}
    return {
        **{key: getattr(arguments, key) for key in ("tokens", "words", "hidden", "supervised", "runs", "threads")},
        "seconds": seconds,
        "faster": median["dense"] / median["anyres"],
        "peak_mb": peak,
        "memory_share": peak["anyres"] / peak["dense"],
        "differs": differs,
        "ratios": {
            "speed": of_peer(seconds["dense"], seconds["anyres"]),
            "memory": of_peer([peak["dense"]], [peak["anyres"]]),
        },
    }


class Problem:
    """Random hidden states of one sequence, with labels and a head."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        generator = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(1, arguments.tokens, arguments.hidden, generator=generator).requires_grad_()
        self.labels = torch.randint(arguments.words, (1, arguments.tokens), generator=generator)
        self.labels[torch.rand(self.labels.shape, generator=generator) >= arguments.supervised] = IGNORE_INDEX
        self.positions, self.targets = supervision(self.labels, [arguments.tokens])
        self.head = nn.Linear(arguments.hidden, arguments.words, bias=False)
        nn.init.normal_(self.head.weight, std=0.02, generator=generator)

    def backward(self, name: str) -> tuple[Tensor, ...]:
        """Return the loss and its gradients by one of the methods."""
        self.hidden.grad = self.head.weight.grad = None
        loss = self._dense() if name == "dense" else summed_loss(self.hidden, self.positions, self.targets, self.head)
        loss.backward()
        assert self.hidden.grad is not None
        assert self.head.weight.grad is not None
        return loss.detach(), self.hidden.grad, self.head.weight.grad

    def _dense(self) -> Tensor:
        logits = self.head(self.hidden)[0, :-1].float()
        return F.cross_entropy(logits, self.labels[0, 1:], ignore_index=IGNORE_INDEX, reduction="sum")

    def difference(self) -> float:
        """Return the largest relative difference of loss and gradients. Fails above the tolerance."""
        pairs = zip(self.backward("anyres"), self.backward("dense"), strict=True)
        found = max(float((mine - theirs).abs().max() / theirs.abs().max()) for mine, theirs in pairs)
        assert found < ATOL, f"loss or gradients differ by {found}"
        return found


def _prepare(arguments: argparse.Namespace, name: str) -> Callable[[], Any]:
    torch.set_num_threads(arguments.threads)
    problem = Problem(arguments)
    return lambda: problem.backward(name)


def show(result: dict[str, Any]) -> None:
    """Print the figures."""
    print(
        f"{result['tokens']:,} tokens x {result['words']:,} words, hidden {result['hidden']}, "
        f"{result['supervised']:.0%} supervised; medians of {result['runs']} alternating runs, "
        f"{result['threads']} threads, fp32"
    )
    for name, times in result["seconds"].items():
        print(f"{name:8} {statistics.median(times):7.3f} s  {result['peak_mb'][name]:7,.0f} MB at the peak")
    print(
        f"anyres is {result['faster']:.2f} times as fast with {result['memory_share']:.1%} of the memory; "
        f"loss and gradients differ by {result['differs']:.1e}"
    )
