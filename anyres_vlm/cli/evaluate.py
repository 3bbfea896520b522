"""`anyres eval`: ask a checkpoint held-out questions and score the answers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Literal

import typer


def evaluate(
    benchmark: Literal["heldout"] = typer.Argument(..., help="heldout: short exact answers, by task."),
    model: Path = typer.Option(..., help="Checkpoint folder."),
    data: Path = typer.Option(
        ..., help="Single questions with a `task` each: LLaVA JSON, Parquet or tar; see anyres render."
    ),
    images: Path | None = typer.Option(None, help="Image folder of the data; without it, the data's own folder."),
    limit: int | None = typer.Option(None, min=2, help="Questions at most."),
    swap_images: bool = typer.Option(
        False, "--swap-images", help="Blind baseline: every question about another image."
    ),
    batch_tokens: int | None = typer.Option(
        None, "--batch-tokens", min=1, help="Tokens that are answered at once; fewer need less memory. Default: 8192."
    ),
    out: Path | None = typer.Option(None, help="Write every answer and the accuracies as JSON."),
    as_json: bool = typer.Option(False, "--json", help="Print the accuracies as JSON."),
) -> None:
    """Score a checkpoint on held-out questions.

    Example: anyres eval heldout --model runs/tiny/stage2/model --data runs/heldout/data.json
    """
    # Start-up time: torch and transformers take seconds to import.
    from dataclasses import asdict

    from anyres_vlm.data.sources import read_records
    from anyres_vlm.evaluate import heldout
    from anyres_vlm.inference import BATCH_TOKENS, Assistant

    assistant = Assistant.load(model)
    records = read_records(data, images, max_bad_fraction=0.0)[:limit]
    asked = heldout.swap_images(records) if swap_images else records

    def progress(done: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done}/{len(records)}", end="\n" if done == len(records) else "", file=sys.stderr)

    results = heldout.ask_all(assistant, asked, progress, batch_tokens or BATCH_TOKENS)
    accuracies = heldout.accuracy_by_task(results)
    if out is not None:
        answers = [asdict(result) | {"correct": result.correct} for result in results]
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"accuracy": accuracies, "answers": answers}, indent=1) + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps(accuracies, indent=2))
    else:
        for task, share in sorted(accuracies.items(), key=lambda item: item[0] == "all"):
            print(f"{task:<10} {share:6.1%}")
