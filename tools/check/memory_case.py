"""Memory of a real training step, counted by the allocator.

Each case trains a small random model for two optimizer steps of two packs on the CPU, through the project's engine.
Torch's profiler counts every allocation and release.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import socket
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from anyres_vlm.config import RunConfig, StageName, load_config, shipped_config
from anyres_vlm.data.loader import Loaded, collate
from anyres_vlm.geometry import Size, plan_tiles
from anyres_vlm.model.vlm import VisionLanguageModel
from anyres_vlm.preflight.estimate.activations import PackSize, stage_skeleton
from anyres_vlm.schema import IGNORE_INDEX, Batch, Sample
from anyres_vlm.train.engine.deepspeed_settings import resolve_deepspeed
from anyres_vlm.train.engine.engine import Engine
from anyres_vlm.train.recipe import build_optimizer, trained_rates

MICRO_STEPS = 2


def case_config(case: dict[str, Any]) -> tuple[RunConfig, StageName]:
    """Return the configuration and stage of a case."""
    return load_config(shipped_config("tiny"), [f"{key}={value}" for key, value in case["set"].items()]), case["stage"]


def document(model: VisionLanguageModel, rng: random.Random, words: int) -> Loaded:
    """Return a sample of one image of random size and this many words, half of them supervised."""
    plan = plan_tiles(Size(height=rng.randint(60, 200), width=rng.randint(60, 200)), model.tiling)
    ids = np.full(words, 5, np.int32)
    ids[1] = model.image_token_id
    labels = np.where(np.arange(words) < words // 2, IGNORE_INDEX, 5).astype(np.int32)
    side = model.tiling.tile
    tiles = np.random.default_rng(0).integers(0, 256, (plan.num_tiles, 3, side, side), dtype=np.uint8)
    return Sample("", ids, labels, (), (plan,)), [tiles]


def make_pack(model: VisionLanguageModel, case: dict[str, Any], seed: str) -> Batch:
    rng = random.Random(seed)
    pack = [document(model, rng, case["words"]) for _ in range(case["documents"])]
    return collate(pack, model.tiling.tile, model.image_token_id)


def pack_size(batch: Batch) -> PackSize:
    """Return what the prediction knows about a pack."""
    return PackSize(batch.input_ids.numel(), len(batch.cu_seqlens) - 1, len(batch.tiles), batch.num_supervised)


def mark(name: str) -> None:
    with record_function(f"mark {name}"):
        pass


def measure(engine: Engine, case: dict[str, Any]) -> dict[str, Any]:
    """Return the bytes of one case on this rank."""
    config, stage = case_config(case)
    torch.manual_seed(0)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = stage_skeleton(config, stage)
        for parameter in model.parameters():
            parameter.data.normal_(std=0.02)
        model.image_token_id = 4
        batches = [make_pack(model, case, f"{engine.rank} {number}") for number in range(MICRO_STEPS)]
        optimizer = build_optimizer(model, trained_rates(config, stage), 0.0)
        gradients: list[int] = []

        def before_forward(*_: object) -> None:
            gradients.append(gradient_bytes(engine, model))
            mark("forward")

        model.register_forward_pre_hook(before_forward)
        model.register_forward_hook(lambda *_: mark("loss"))
        settings = None if case["preset"] is None else resolve_deepspeed(Path(case["preset"]), config, stage)
        engine.prepare(model, optimizer, 1.0, settings)
        engine.step(batches)
        gc.collect()
        mark("second")
        result = engine.step(batches)
        assert not result.is_skipped
        gc.collect()
        mark("end")
        static = static_bytes(engine, model)
    del engine._backend  # otherwise it would be released during the next case
    found = read(profiler) | static
    return found | {"gradients": gradients[-1], "pack": vars(pack_size(batches[-1]))}


def static_bytes(engine: Engine, model: VisionLanguageModel) -> dict[str, int]:
    """Return the bytes of weights, masters and moments between steps; shared storages count once."""
    backend = engine._backend
    adamw = optimizer_of(backend)
    weights = [tensor for p in model.parameters() for tensor in (p.data, getattr(p, "ds_tensor", None))]
    masters = [p.data for group in adamw.param_groups for p in group["params"]]
    masters += list(getattr(getattr(backend, "_zero", None), "fp32_partitioned_groups_flat", []))
    moments = [t for entry in adamw.state.values() for t in entry.values() if isinstance(t, Tensor)]
    known: set[int] = set()
    return {
        name: unique_bytes(tensors, known)
        for name, tensors in (("weights", weights), ("masters", masters), ("moments", moments))
    }


def gradient_bytes(engine: Engine, model: VisionLanguageModel) -> int:
    """Return the bytes of accumulated gradients, wherever the backend keeps them; shared storages count once."""
    zero = getattr(engine._backend, "_zero", None)
    kept = [getattr(zero, "grad_partitions_flat_buffer", None), *getattr(zero, "fp32_groups_gradients_flat", [])]
    for by_group in ("averaged_gradients", "all_grad_tensors"):
        kept += [part for parts in getattr(zero, by_group, {}).values() for part in parts or []]
    kept += [tensor for p in model.parameters() for tensor in (p.grad, getattr(p, "grad_accum", None))]
    return unique_bytes(kept, set())


def optimizer_of(backend: Any) -> Any:
    return backend._adamw if hasattr(backend, "_adamw") else backend._zero.optimizer


def unique_bytes(tensors: list[Tensor | None], known: set[int]) -> int:
    total = 0
    for tensor in tensors:
        if tensor is not None and (storage := tensor.untyped_storage()).data_ptr() not in known:
            known.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def read(profiler: Any) -> dict[str, int]:
    """Return the bytes allocated at the marks, and the peaks between them."""
    events = [
        (event.start_ns(), event.name(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]" or event.name().startswith("mark ")
    ]
    level = peak = 0
    levels: dict[str, list[int]] = {}
    peaks: dict[str, list[int]] = {}
    last = "begin"
    for _, name, size in sorted(events, key=lambda event: event[0]):
        if name == "[memory]":
            level += size
            peak = max(peak, level)
            continue
        peaks.setdefault(last, []).append(peak)
        last, peak = name.removeprefix("mark "), level
        levels.setdefault(last, []).append(level)
    second = slice(MICRO_STEPS, None)  # forward passes of the second step
    return {
        "activations": levels["loss"][-1] - levels["forward"][-1],
        "peak": max(peaks["second"] + peaks["forward"][second] + peaks["loss"][second]),
    }


def run_case(case: dict[str, Any], ranks: int) -> dict[str, Any]:
    """Measure one case in new processes, one per rank. Returns the bytes of rank 0."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=_child, args=(case, rank, ranks, port, results)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"a rank of this case failed: {case}")
    found: dict[str, Any] = results.get()
    return found


def _child(case: dict[str, Any], rank: int, ranks: int, port: int, results: Any) -> None:
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    engine = Engine.start(case_config(case)[0].precision, rank_timeout_minutes=5)
    found = measure(engine, case)
    if rank == 0:
        results.put(found)
    engine.close()
