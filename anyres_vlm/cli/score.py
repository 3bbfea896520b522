"""`anyres score`: score an answer file as the benchmark's official script does; needs no model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from anyres_vlm.errors import UsageError

if TYPE_CHECKING:
    from anyres_vlm.evaluate.benchmarks.mmvet import Judge

JUDGE_HELP = "mmvet: chat model that grades the answers; its key is in OPENAI_API_KEY."
JUDGE_URL_HELP = "mmvet: OpenAI-compatible endpoint; default: OPENAI_BASE_URL, or OpenAI."
JUDGE_PROMPT_HELP = "mmvet: mm-vet_evaluator.py, for its prompt, or a text file; default: our own prompt."


def score(
    benchmark: Literal["vqav2", "gqa", "textvqa", "pope", "mmvet"] = typer.Argument(
        ..., help="Benchmark whose scorer to use."
    ),
    answers: Path = typer.Option(
        ...,
        help="JSON or JSON lines: an official submission, or raw answers with `question_id` and `text`.",
    ),
    annotations: list[Path] = typer.Option(
        ..., help="Official file with the right answers; for several POPE splits a folder, or repeat the option."
    ),
    judge: str | None = typer.Option(None, help=JUDGE_HELP),
    judge_url: str | None = typer.Option(None, "--judge-url", help=JUDGE_URL_HELP),
    judge_prompt: Path | None = typer.Option(None, "--judge-prompt", help=JUDGE_PROMPT_HELP),
    out: Path | None = typer.Option(
        None, help="Folder for the result with the points of every answer, for anyres report."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print the scores as one JSON object."),
) -> None:
    """Score answers as the official script does, to its last printed digit.

    Example: anyres score pope --answers eval/pope.answers.jsonl --annotations coco_pope_random.json
    """
    # Start-up time: NumPy.
    from anyres_vlm.evaluate.answers import read_answers
    from anyres_vlm.evaluate.benchmarks import make_benchmark
    from anyres_vlm.evaluate.report.results import write_result

    grader = make_judge(judge, judge_url, judge_prompt, answers.with_name(f"{answers.name}.grades.jsonl"))
    chosen = make_benchmark(benchmark, judge=grader)
    files = [file for path in annotations for file in ([path] if path.is_file() else chosen.annotations(path))]
    if len(files) != 1 and benchmark != "pope":
        raise UsageError(f"--annotations {annotations[0]}: expected one file with the right answers, got {len(files)}")
    given = read_answers(answers)
    scored = chosen.score(files, given, partial=False)
    result = {
        "benchmark": benchmark,
        "model": str(answers),
        "questions": len(scored.marks),
        "annotations": [path.name for path in files],
        "protocol": dict(chosen.protocol),
        "score": scored.score,
        "scores": dict(scored.scores),
    }
    if out is not None:
        write_result(out, benchmark, result, scored)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        print_scores(benchmark, result)


def make_judge(model: str | None, url: str | None, prompt: Path | None, cache: Path) -> Judge | None:
    """Return the judge that the options describe; None without --judge."""
    if model is None:
        if url or prompt:
            raise UsageError("--judge-url and --judge-prompt need --judge, the name of the judge's model")
        return None
    # Start-up time.
    from anyres_vlm.evaluate.benchmarks.mmvet import INSTRUCTIONS, Judge, read_instructions

    return Judge(model, INSTRUCTIONS if prompt is None else read_instructions(prompt), cache, url)


def print_scores(name: str, result: Mapping[str, Any]) -> None:
    """Print the official numbers and the protocol, groups indented."""
    headline = "no score" if result["score"] is None else f"{result['score']}"
    print(f"{name}: {headline} ({result['questions']:,} questions)")
    for key, value in result["scores"].items():
        if isinstance(value, Mapping):
            print(f"  {key}")
            for inner, number in value.items():
                print(f"    {inner:<28} {_shown(number)}")
        else:
            print(f"  {key:<30} {_shown(value)}")
    for key, words in result["protocol"].items():
        print(f"  {key:<30} {words.encode('unicode_escape').decode()}")


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "-" if value is None else str(value)
