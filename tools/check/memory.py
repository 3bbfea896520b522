#!/usr/bin/env python3
"""Compare the memory that `anyres estimate` predicts with that of real training steps, in one table.

    tools/check/memory.py            three sizes, both precisions, plain and ZeRO-1, 2 and 3, 1 and 2 ranks
    tools/check/memory.py --quick    one case

Small random models train two optimizer steps on the CPU over gloo, and every byte that torch's allocator hands out is
counted on rank 0. `activations` include the weights that ZeRO-3 has gathered; `peak` is the maximum of the second
step.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from memory_case import case_config, run_case
from transformers import CLIPVisionConfig, LlamaConfig

import anyres_vlm.train.engine.zero  # noqa: F401 - imported once, not in every rank
from anyres_vlm.preflight.estimate.activations import PackSize, micro_step_bytes, stage_skeleton
from anyres_vlm.preflight.estimate.memory import count_parameters, numbers_of, rank_memory, read_sharding
from anyres_vlm.train.engine.deepspeed_settings import find_preset

COLUMNS = ("weights", "optimizer", "gradients", "activations", "peak")
# width, layers, vocabulary, words per document, documents per pack
SIZES = {"narrow": (128, 8, 1000, 40, 6), "middle": (192, 6, 2000, 60, 6), "wide": (320, 3, 4000, 90, 8)}
BUCKET = 200_000  # elements; with the shipped sizes, buckets would be most of the memory of these models


def write_bases(folder: Path, size: str) -> dict[str, str]:
    """Write a language model and an encoder as configurations only; return the settings that name them."""
    width, layers, vocabulary, *_ = SIZES[size]
    LlamaConfig(
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=2,
        vocab_size=vocabulary,
    ).save_pretrained(folder / size / "llm")
    CLIPVisionConfig(
        hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, image_size=56, patch_size=14
    ).save_pretrained(folder / size / "vit")
    return {"model.llm": f"{folder}/{size}/llm", "model.encoder.name": f"{folder}/{size}/vit"}


def write_preset(folder: Path, name: str) -> str:
    """Write a shipped preset with small buckets; return its path."""
    content = json.loads(find_preset(name).read_text(encoding="utf-8"))
    zero = content["zero_optimization"]
    for key in ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size"):
        if key in zero:
            zero[key] = BUCKET
    if "stage3_param_persistence_threshold" in zero:
        zero["stage3_param_persistence_threshold"] = 1000
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def make_case(
    folder: Path, size: str, precision: str, preset: str | None, *, recompute: bool, stage: str = "stage2"
) -> dict[str, Any]:
    """Return a case, as `run_case` and `predict` take it."""
    *_, words, documents = SIZES[size]
    settings = write_bases(folder, size) | {"precision": precision, f"{stage}.activation_checkpointing": recompute}
    return {
        "size": size,
        "set": settings,
        "stage": stage,
        "preset": None if preset is None else write_preset(folder, preset),
        "words": words,
        "documents": documents,
    }


def predict(case: dict[str, Any], ranks: int, pack: PackSize) -> dict[str, float]:
    """Return the prediction of `anyres estimate` for a case, without the fused optimizer of a GPU."""
    config, stage = case_config(case)
    sharding = read_sharding(case["preset"])
    numbers = numbers_of(sharding, config.precision)
    count = count_parameters(stage_skeleton(config, stage), sharding)
    [step] = micro_step_bytes(config, stage, [pack], numbers)
    memory = rank_memory(count, sharding, numbers, ranks, step, fused=False)
    return {
        "weights": memory.weights,
        "optimizer": memory.masters + memory.moments,
        "gradients": memory.gradients,
        "activations": memory.activations + memory.gathered,
        "peak": memory.peak,
    }


def compare(case: dict[str, Any], ranks: int) -> dict[str, tuple[float, float]]:
    """Return predicted and measured bytes by kind."""
    found = run_case(case, ranks)
    # In a child process: after a backward pass, this one could not be forked again for the next case.
    with multiprocessing.get_context("fork").Pool(1) as pool:
        predicted = pool.apply(predict, (case, ranks, PackSize(**found["pack"])))
    found["optimizer"] = found["masters"] + found["moments"]
    return {name: (predicted[name], found[name]) for name in COLUMNS}


def all_cases(folder: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield all cases with their number of ranks. Checkpointing alternates; stage 1 has a frozen language model."""
    for size in SIZES:
        for precision in ("fp32", "bf16"):
            for number, preset in enumerate((None, "zero1", "zero2", "zero3")):
                for ranks in (1, 2):
                    yield make_case(folder, size, precision, preset, recompute=(number + ranks) % 2 == 0), ranks
        yield make_case(folder, size, "bf16", "zero2", recompute=True, stage="stage1"), 2
        yield make_case(folder, size, "bf16", None, recompute=False, stage="stage1"), 1


def few_cases(folder: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the one case that is split the most."""
    yield make_case(folder, "middle", "bf16", "zero3", recompute=True), 2


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    """Yield each case in words, with predicted and measured `bytes`."""
    with tempfile.TemporaryDirectory() as folder:
        for case, ranks in (few_cases if quick else all_cases)(Path(folder)):
            config, stage = case_config(case)
            yield {
                "size": case["size"],
                "stage": stage,
                "precision": config.precision,
                "preset": "none" if case["preset"] is None else Path(case["preset"]).stem,
                "ranks": ranks,
                "recompute": "yes" if config.stage(stage).activation_checkpointing else "no",
                "bytes": compare(case, ranks),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one case")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON list")
    arguments = parser.parse_args()
    if arguments.json:
        print(json.dumps(list(rows(arguments.quick)), indent=1))
        return
    print("MB predicted/measured and their ratio")
    print("size   stage  numbers preset ranks recompute" + "".join(f"{name:>23}" for name in COLUMNS))
    worst = dict.fromkeys(COLUMNS, 0.0)
    for row in rows(arguments.quick):
        line = f"{row['size']:6} {row['stage']:6} {row['precision']:7} {row['preset']:6} {row['ranks']:5} "
        line += f"{row['recompute']:9}"
        for name, (predicted, measured) in row["bytes"].items():
            line += f"{predicted / 1e6:9.2f}/{measured / 1e6:6.2f} {predicted / measured:6.3f}"
            worst[name] = max(worst[name], abs(predicted / measured - 1))
        print(line, flush=True)
    print("largest error: " + ", ".join(f"{name} {error:.1%}" for name, error in worst.items()))


if __name__ == "__main__":
    main()
