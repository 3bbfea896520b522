"""Text and JSON of an estimate."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from anyres_vlm.preflight.estimate.choice import Machines, StageEstimate, Way
from anyres_vlm.preflight.estimate.memory import LARGEST
from anyres_vlm.preflight.estimate.published import PublishedRow
from anyres_vlm.preflight.estimate.workload import GB

# Fields of `RankMemory` and their labels in the table.
PARTS = {
    "weights": "weights",
    "masters": "optimizer: fp32 weights",
    "moments": "optimizer: two moments",
    "gradients": "gradients",
    "buckets": "communication buckets",
    "gathered": "weights gathered by ZeRO-3",
    "activations": "saved activations and loss gradients",
    "working": "working memory",
}


def describe(estimates: Sequence[StageEstimate], machines: Machines, price: float | None) -> str:
    """Return a table per stage and the sum."""
    device = machines.device
    lines = [
        f"{machines.gpus} x {device.name}: {device.memory / GB:.0f} GB each, {machines.usable / GB:.1f} GB for "
        f"tensors (headroom {machines.headroom:.0%}, CUDA and NCCL {machines.reserved / GB:.1f} GB); "
        f"{device.peak / 1e12:.0f} TFLOP/s in bf16, MFU {machines.mfu:.0%}",
    ]
    for estimate in estimates:
        lines += ["", *_stage_lines(estimate, machines)]
    if all(estimate.hours is not None for estimate in estimates):
        total = sum(estimate.hours or 0 for estimate in estimates)
        lines += ["", f"both stages: {_hours(total, machines.gpus, price)}"]
    return "\n".join(lines)


def _stage_lines(estimate: StageEstimate, machines: Machines) -> Iterator[str]:
    count = estimate.parameters
    yield f"{estimate.stage}: {count.total / 1e9:.2f} B parameters, {count.trained / 1e9:.3f} B trained"
    samples = estimate.samples
    yield f"  {len(samples.tokens):,} samples, {int(samples.tokens.sum()):,} tokens, {int(samples.tiles.sum()):,} tiles"
    yield f"  {samples.origin}"
    yield f"  {'preset':30} {'GB/rank':>10} {'host GB':>8}  largest pack (host: of rank 0, with a checkpoint)"
    for way in estimate.ways:
        yield f"  {way.name:30} {_peak(way):>10} {_host(way):>8}  {_largest(way)}"
    if estimate.chosen is None or estimate.plan is None or estimate.hours is None:
        yield f"  {estimate.reason}"
        return
    chosen, plan = estimate.chosen, estimate.plan
    yield f"  cheapest that fits: {chosen.name}" + (f"; {chosen.reason}" if chosen.reason else "")
    if chosen.memory is not None:
        yield f"    GB per rank with packs of {estimate.capacity:,} tokens"
        for name, words in PARTS.items():
            yield f"    {words:38} {getattr(chosen.memory, name) / GB:8.2f}"
        yield f"    {'optimizer step (temporary)':38} {chosen.memory.update / GB:8.2f}"
        yield f"    {'peak':38} {chosen.memory.peak / GB:8.2f}"
    yield (
        f"    {plan.steps:,} steps of {plan.packs_per_step} packs, {plan.efficiency:.1%} full, straggler factor "
        f"{plan.straggler:.3f}: {_hours(estimate.hours, machines.gpus, None)}"
    )


def _peak(way: Way) -> str:
    return f"{(way.least if way.memory is None else way.memory.peak) / GB:.1f}{'+' if way.memory is None else ''}"


def _host(way: Way) -> str:
    return "" if way.memory is None else f"{way.memory.host / GB:.0f}"


def _largest(way: Way) -> str:
    if way.largest is None:
        return f"none: {way.reason}"
    more = " or more" if way.largest >= LARGEST else ""
    return f"{way.largest:,} tokens{more}" + (" (less than the capacity)" if way.reason else "")


def _hours(hours: float, gpus: int, price: float | None) -> str:
    words = f"{hours:.1f} hours, {hours * gpus:,.0f} GPU-hours"
    return words if price is None else f"{words}, {hours * gpus * price:,.0f} at {price:g} per GPU-hour"


def to_json(estimates: Sequence[StageEstimate], machines: Machines, price: float | None) -> str:
    """Return all figures as JSON, in bytes and hours."""
    stages = [_stage_json(estimate, machines, price) for estimate in estimates]
    settings = {**asdict(machines), "usable": machines.usable, "price": price}
    return json.dumps({"machines": settings, "stages": stages}, indent=2)


def _stage_json(estimate: StageEstimate, machines: Machines, price: float | None) -> dict[str, Any]:
    samples, hours = estimate.samples, estimate.hours
    gpu_hours = None if hours is None else hours * machines.gpus
    return {
        "stage": estimate.stage,
        "parameters": asdict(estimate.parameters),
        "samples": len(samples.tokens),
        "tokens": int(samples.tokens.sum()),
        "tiles": int(samples.tiles.sum()),
        "supervised_tokens": int(samples.supervised.sum()),
        "origin": samples.origin,
        "capacity": estimate.capacity,
        "longest": estimate.longest,
        "ways": [_way_json(way) for way in estimate.ways],
        "chosen": None if estimate.chosen is None else estimate.chosen.name,
        "reason": estimate.reason,
        "plan": None if estimate.plan is None else asdict(estimate.plan),
        "flops": None if estimate.work is None else asdict(estimate.work),
        "hours": hours,
        "gpu_hours": gpu_hours,
        "cost": None if price is None or gpu_hours is None else price * gpu_hours,
    }


def _way_json(way: Way) -> dict[str, Any]:
    return {
        "name": way.name,
        "preset": way.sharding.name,
        "activation_checkpointing": way.recomputes,
        "memory": None if way.memory is None else asdict(way.memory) | {"peak": way.memory.peak},
        "least": way.least,
        "largest_capacity": way.largest,
        "reason": way.reason,
    }


def describe_published(rows: Sequence[PublishedRow], mfu: float) -> str:
    """Return the table of published runs with the assumptions about them."""
    lines = [
        f"{'run':20} {'GPUs':>4}  {'stage':6} {'G tokens':>8} {'EFLOP':>7} {'hours':>6} {f'at {mfu:.0%}':>6}  "
        "implied MFU",
    ]
    for row in rows:
        stages = "+".join(stage.removeprefix("stage") for stage in row.stages)
        lines.append(
            f"{row.run:20} {row.gpus:4}  {stages:6} {row.tokens / 1e9:8.2f} {row.flops / 1e18:7.1f} "
            f"{row.published_hours:6.1f} {row.predicted_hours:6.1f}  {row.implied_mfu:11.1%}"
        )
    lines.append("hours: published, then predicted for A100s with activation checkpointing")
    for row in {row.run: row for row in rows}.values():
        mix = row.assumed
        lines.append(
            f"{row.run}: {row.source}; assumed for stage 2: {mix.samples:,} samples, {mix.with_image:,} with an "
            f"image of 640x480, {mix.text_tokens} tokens of text, {mix.supervised} supervised"
        )
    return "\n".join(lines)


def published_json(rows: Sequence[PublishedRow]) -> str:
    """Return the table of published runs as JSON."""
    return json.dumps([asdict(row) for row in rows], indent=2)
