"""`anyres eval`: run benchmarks or held-out questions on a checkpoint and score the answers."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from enum import StrEnum
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from anyres_vlm.cli.options import DEVICES, LOAD, TEMPLATE, Devices, Load, load_assistant
from anyres_vlm.cli.score import JUDGE_HELP, JUDGE_PROMPT_HELP, JUDGE_URL_HELP, make_judge, print_scores
from anyres_vlm.errors import UsageError

if TYPE_CHECKING:
    from anyres_vlm.data.index.build import Shard
    from anyres_vlm.evaluate.runner import Task


Name = StrEnum("Name", ["vqav2", "gqa", "textvqa", "pope", "mmvet", "heldout"])  # typer has no lists of Literal


def evaluate(
    benchmarks: list[Name] = typer.Argument(
        ..., metavar="BENCH...", help="vqav2, gqa, textvqa, pope, mmvet, heldout (exact answers, by task)."
    ),
    model: str = typer.Option(..., help="Checkpoint folder (anyres_vlm or LlavaNext) or hub id."),
    data: Path = typer.Option(
        ...,
        help="Folder with the official files, as unpacked, or the question file; for several benchmarks a folder with "
        "one subfolder each. heldout: LLaVA JSON, Parquet or tar whose records have a `task`; see anyres render.",
    ),
    images: Path | None = typer.Option(None, help="Image folder; default: the usual folders near the question file."),
    template: str | None = TEMPLATE,
    load: Load | None = LOAD,
    devices: Devices | None = DEVICES,
    limit: int | None = typer.Option(None, min=1, help="Use the first questions only; for POPE, of each split."),
    ocr_tokens: bool | None = typer.Option(
        None, "--ocr-tokens/--no-ocr-tokens", help="textvqa: Rosetta OCR tokens in the prompt or not; required."
    ),
    judge: str | None = typer.Option(None, help=JUDGE_HELP),
    judge_url: str | None = typer.Option(None, "--judge-url", help=JUDGE_URL_HELP),
    judge_prompt: Path | None = typer.Option(None, "--judge-prompt", help=JUDGE_PROMPT_HELP),
    shard: str | None = typer.Option(
        None,
        metavar="I/N",
        help="Answer the I-th of N ranges; the last process writes the result. Default: torchrun's.",
    ),
    swap_images: bool = typer.Option(
        False, "--swap-images", help="heldout: blind baseline, which shows each question another question's image."
    ),
    against: Path | None = typer.Option(
        None, help="heldout: result of another run on the same questions; prints the difference."
    ),
    batch_tokens: int | None = typer.Option(
        None, "--batch-tokens", min=1, help="Tokens in a batch; fewer need less memory. Default: 8192."
    ),
    out: Path | None = typer.Option(
        None,
        help="Folder for answers and results; default: eval next to the model. heldout: also NAME.json.",
    ),
    as_json: bool = typer.Option(False, "--json", help="Print the results as JSON."),
) -> None:
    """Score a checkpoint on benchmarks. All files are checked before the first question; a killed run resumes.

    Example: anyres eval gqa pope --model runs/tiny/stage2/model --data playground/eval
    """
    from anyres_vlm.config import template_name

    named = template_name(template)
    if "heldout" not in benchmarks and (swap_images or against is not None):
        raise UsageError("--swap-images and --against need the benchmark heldout")
    folder, heldout_title = _destination(model, out, benchmarks, swap_images)
    grader = None
    if "mmvet" in benchmarks:
        grader = make_judge(judge, judge_url, judge_prompt, folder / "mmvet.grades.jsonl")
    if grader is not None:
        grader.connect()  # a missing key is reported before the first question
    # Start-up time: torch and transformers take seconds to import.
    from anyres_vlm.cli.progress import show_rows
    from anyres_vlm.evaluate.benchmarks import make_benchmark
    from anyres_vlm.evaluate.benchmarks.heldout import check_same_questions, gain, read_correct
    from anyres_vlm.evaluate.runner import Run, Task, check_prompts, evaluate as run_benchmark, prepare
    from anyres_vlm.inference.assistant import BATCH_TOKENS

    run = Run(model, images, folder, limit, _shard(shard), batch_tokens or BATCH_TOKENS, named, load)
    tasks = [
        Task(
            make_benchmark(name, ocr_tokens, grader, swap_images),
            data / name if (data / name).is_dir() else data,
            heldout_title if name == "heldout" else str(name),
        )
        for name in dict.fromkeys(benchmarks)
    ]
    others = {} if against is None else read_correct(against)
    prepared = prepare(run, tasks)
    for one in prepared:
        if against is not None and one.task.benchmark.name == "heldout":
            check_same_questions([str(question.id) for question in one.questions], others)
    results: dict[str, dict[str, Any] | None] = {}
    load_model = cache(partial(load_assistant, model, template, load, devices))
    check_prompts(prepared, load_model)
    for one in prepared:
        name = one.task.benchmark.name
        with show_rows(name) as progress:
            results[name] = run_benchmark(one, load_model, progress)
        if not as_json:
            _print(one.task, results[name], folder)
    if as_json:
        heldout = results.get("heldout") if len(tasks) == 1 else None
        print(json.dumps(results if heldout is None else heldout["scores"], indent=2))
    if against is not None and results["heldout"] is not None:
        more, margin = gain(read_correct(folder / f"{heldout_title}.json"), others)
        print(f"difference from {against.stem}: {100 * more:+.1f} points, 95% interval +-{100 * margin:.1f}")


def _destination(model: str, out: Path | None, benchmarks: Sequence[Name], swap_images: bool) -> tuple[Path, str]:
    """Return the folder of the results, and the stem of the files of held-out questions."""
    title = "heldout-blind" if swap_images else "heldout"
    if out is not None and out.suffix == ".json" and list(benchmarks) == ["heldout"]:
        return out.parent, out.stem
    if out is not None:
        return out, title
    folder = Path(model)
    if not folder.is_dir():
        raise UsageError(f"{model}: not a checkpoint folder, next to which results could go: name a folder with --out")
    return folder.absolute().parent / "eval", title


def _print(task: Task, result: dict[str, Any] | None, folder: Path) -> None:
    name = task.benchmark.name
    if result is None:
        print(f"{name}: this range is answered; the last process writes {folder / task.title}.json")
    elif name == "heldout":
        print(f"{name}: {result['score']} ({result['questions']:,} questions)")
        for kind, share in sorted(result["scores"].items(), key=lambda item: item[0] == "all"):
            print(f"  {kind:<10} {share:6.1%}")
    else:
        print_scores(name, result)
        if not result["scores"]:
            print(f"  no published answers, or no --judge: submit {folder / name}.submission.json")


def _shard(text: str | None) -> Shard:
    """Return the given range, or that of this rank under torchrun; then also select the rank's GPU."""
    # Start-up time.
    import torch

    from anyres_vlm.data.index.build import Shard

    if text is not None:
        return Shard.parse(text)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1 and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return Shard(int(os.environ.get("RANK", "0")) + 1, ranks)
