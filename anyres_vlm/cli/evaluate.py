"""`anyres eval`: ask a checkpoint the questions of benchmarks, or held-out questions, and score the answers."""

from __future__ import annotations

import json
import os
import sys
from enum import StrEnum
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from anyres_vlm.cli.options import TEMPLATE
from anyres_vlm.cli.score import JUDGE_HELP, JUDGE_PROMPT_HELP, JUDGE_URL_HELP, make_judge, print_scores
from anyres_vlm.errors import UsageError

if TYPE_CHECKING:
    from anyres_vlm.config import TemplateName
    from anyres_vlm.data.index.build import Shard


class Name(StrEnum):
    """What can be asked: benchmarks, and the held-out questions of `anyres render`."""

    VQAV2 = "vqav2"
    GQA = "gqa"
    TEXTVQA = "textvqa"
    POPE = "pope"
    MMVET = "mmvet"
    HELDOUT = "heldout"


def evaluate(
    benchmarks: list[Name] = typer.Argument(
        ..., metavar="BENCH...", help="vqav2, gqa, textvqa, pope, mmvet; or heldout alone: exact answers, by task."
    ),
    model: str = typer.Option(..., help="Checkpoint folder, ours or LlavaNext's, or a hub id."),
    data: Path = typer.Option(
        ...,
        help="Folder of the benchmark's official files, or its question file; for several benchmarks a folder that has "
        "one of each name. heldout: LLaVA JSON, Parquet or tar with a `task` each; see anyres render.",
    ),
    images: Path | None = typer.Option(None, help="Image folder; without it, the usual names beside the data."),
    template: str | None = TEMPLATE,
    limit: int | None = typer.Option(None, min=1, help="Questions at most; of POPE, of each split."),
    ocr_tokens: bool | None = typer.Option(
        None, "--ocr-tokens/--no-ocr-tokens", help="textvqa: with or without Rosetta's words in the prompt; required."
    ),
    judge: str | None = typer.Option(None, help=JUDGE_HELP),
    judge_url: str | None = typer.Option(None, "--judge-url", help=JUDGE_URL_HELP),
    judge_prompt: Path | None = typer.Option(None, "--judge-prompt", help=JUDGE_PROMPT_HELP),
    shard: str | None = typer.Option(
        None, metavar="I/N", help="Answer the I-th of N ranges, from 1; the last to end writes the result. Or torchrun."
    ),
    swap_images: bool = typer.Option(
        False, "--swap-images", help="heldout: blind baseline, every question about another image."
    ),
    against: Path | None = typer.Option(
        None, help="heldout: answers to the same questions that another --out has; prints the difference."
    ),
    batch_tokens: int | None = typer.Option(
        None, "--batch-tokens", min=1, help="Tokens that are answered at once; fewer need less memory. Default: 8192."
    ),
    out: Path | None = typer.Option(
        None, help="Folder for answers, submissions and results; default: eval beside the model. heldout: a JSON file."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print the results as JSON."),
) -> None:
    """Score a checkpoint on benchmarks. A run that was killed goes on where it was.

    Example: anyres eval gqa pope --model runs/tiny/stage2/model --data playground/eval
    """
    from anyres_vlm.config import template_name

    named = template_name(template)
    if Name.HELDOUT in benchmarks:
        if len(benchmarks) > 1 or shard is not None:
            raise UsageError("heldout is scored alone, in one process: name it by itself")
        _heldout(model, named, data, images, limit, swap_images, against, batch_tokens, out, as_json)
        return
    if swap_images or against is not None:
        raise UsageError("--swap-images and --against are heldout's: name it, or leave them out")
    folder = out or _default_out(model)
    judging = "mmvet" in benchmarks
    grader = make_judge(judge, judge_url, judge_prompt, folder / "mmvet.grades.jsonl") if judging else None
    if grader is not None:
        grader.connect()  # a key that is missing shows now, not behind hours of answers
    # Start-up time: torch and transformers take seconds to import.
    from anyres_vlm.evaluate.benchmarks import make_benchmark
    from anyres_vlm.evaluate.runner import Run, evaluate as run_benchmark
    from anyres_vlm.inference import BATCH_TOKENS, Assistant
    from anyres_vlm.serve.progress import RowProgress

    load = cache(partial(Assistant.load, model, named))  # when the first benchmark has an open question
    chosen = {str(name): make_benchmark(name, ocr_tokens, grader) for name in benchmarks}
    places = {name: data / name if (data / name).is_dir() else data for name in chosen}
    for name, benchmark in chosen.items():
        benchmark.questions(places[name], images, limit)  # what is wrong with the last shows before the first is asked
    results: dict[str, Any] = {}
    for name, benchmark in chosen.items():
        run = Run(model, load, places[name], images, folder, limit, _shard(shard), batch_tokens or BATCH_TOKENS, named)
        with RowProgress(name) as progress:
            results[name] = run_benchmark(run, benchmark, progress.update)
        if not as_json:
            _print(name, results[name], folder)
    if as_json:
        print(json.dumps(results, indent=2))


def _print(name: str, result: dict[str, Any] | None, folder: Path) -> None:
    if result is None:
        print(f"{name}: this range is answered; the process that ends last writes {folder / name}.json")
        return
    print_scores(name, result)
    if not result["scores"]:
        print(f"  no published answers beside the questions, or no --judge: {folder / name}.submission.json")


def _default_out(model: str) -> Path:
    folder = Path(model)
    if not folder.is_dir():
        raise UsageError(f"{model}: results go beside a checkpoint folder, this is none: name a folder with --out")
    return folder.absolute().parent / "eval"


def _shard(text: str | None) -> Shard:
    """The range that is asked for, or this rank's under torchrun, which then has its own GPU."""
    # Start-up time.
    import torch

    from anyres_vlm.data.index.build import Shard

    if text is not None:
        return Shard.parse(text)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1 and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return Shard(int(os.environ.get("RANK", "0")) + 1, ranks)


def _heldout(
    model: str,
    template: TemplateName | None,
    data: Path,
    images: Path | None,
    limit: int | None,
    swap_images: bool,
    against: Path | None,
    batch_tokens: int | None,
    out: Path | None,
    as_json: bool,
) -> None:
    # Start-up time: torch and transformers take seconds to import.
    from dataclasses import asdict

    from anyres_vlm.data.sources import read_records
    from anyres_vlm.evaluate import heldout
    from anyres_vlm.inference import BATCH_TOKENS, Assistant

    assistant = Assistant.load(model, template)
    tiling = asdict(assistant.model.tiling)
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
        content = {"model": model, "limit": limit, "blind": swap_images, "tiling": tiling, "accuracy": accuracies}
        out.write_text(json.dumps(content | {"answers": answers}, indent=1) + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps(accuracies, indent=2))
    else:
        for task, share in sorted(accuracies.items(), key=lambda item: item[0] == "all"):
            print(f"{task:<10} {share:6.1%}")
    if against is not None:
        more, margin = heldout.gain(results, heldout.read_correct(against))
        print(f"more than {against.stem}: {100 * more:+.1f} points, 95% interval +-{100 * margin:.1f}")
