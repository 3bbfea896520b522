"""`anyres probe`: measure failure modes of a checkpoint on rendered images."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Any

import typer

from anyres_vlm.cli.options import DEVICES, LOAD, TEMPLATE, Devices, Load, load_assistant

Probe = StrEnum("Probe", ["hallucination", "spatial", "counting", "reading"])  # typer has no lists of Literal


def probe(
    probes: list[Probe] = typer.Argument(None, metavar="[PROBE]...", help="Probes to run; default: all."),
    model: str = typer.Option(..., help="Checkpoint folder (anyres_vlm or LlavaNext) or hub id."),
    count: int = typer.Option(20, min=1, help="Images for each value of the factor that a probe varies."),
    template: str | None = TEMPLATE,
    load: Load | None = LOAD,
    devices: Devices | None = DEVICES,
    seed: int = typer.Option(0, help="Seed of the images."),
    batch_tokens: int | None = typer.Option(None, "--batch-tokens", min=1, help="Tokens in a batch; default: 8192."),
    out: Path | None = typer.Option(None, help="Folder for probes.json, with all answers, and probes.png."),
    as_json: bool = typer.Option(False, "--json", help="Print the scores as JSON."),
) -> None:
    """Measure hallucination, spatial relations, counting and reading on images with exact answers.

    Example: anyres probe reading --model runs/tiny/stage2/model --out runs/probes
    """
    # Start-up time: torch and transformers take seconds to import.
    from dataclasses import asdict

    from anyres_vlm.evaluate.probes.suite import PROBES, run_probes
    from anyres_vlm.evaluate.report.probing import draw_probes
    from anyres_vlm.inference.assistant import BATCH_TOKENS

    def progress(name: str, answers: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{name}: {answers} answers", end="", file=sys.stderr)

    names = [str(name) for name in dict.fromkeys(probes or PROBES)]
    assistant = load_assistant(model, template, load, devices)
    results = run_probes(assistant, names, count, seed, batch_tokens or BATCH_TOKENS, progress)
    scores = {name: result.scores for name, result in results.items()}
    if sys.stderr.isatty():
        print(file=sys.stderr)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        content = {
            "model": model,
            "load": load,
            "count": count,
            "seed": seed,
            "scores": scores,
            "replies": {name: [asdict(reply) for reply in result.replies] for name, result in results.items()},
        }
        (out / "probes.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        draw_probes(scores, out / "probes.png")
    if as_json:
        print(json.dumps(scores, indent=2))
    else:
        for name, table in scores.items():
            print(f"\n{name}")
            _print(table)


def _print(table: dict[str, Any], indent: int = 2) -> None:
    for key, row in table.items():
        if any(isinstance(value, dict) for value in row.values()):
            print(f"{'':{indent}}{key}")
            _print(row, indent + 2)
        else:
            cells = (f"{name} {'-' if value is None else format(value, '.2f')}" for name, value in row.items())
            print(f"{'':{indent}}{key:<{16 - indent}} {'  '.join(cells)}")
