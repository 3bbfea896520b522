"""`anyres probe`: failure modes of a checkpoint on pictures drawn for the purpose."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Any

import typer

from anyres_vlm.cli.options import TEMPLATE


class Probe(StrEnum):
    """A failure mode."""

    HALLUCINATION = "hallucination"
    SPATIAL = "spatial"
    COUNTING = "counting"
    READING = "reading"


def probe(
    probes: list[Probe] = typer.Argument(None, metavar="[PROBE]...", help="Those to run; all without any."),
    model: str = typer.Option(..., help="Checkpoint folder, ours or LlavaNext's, or a hub id."),
    count: int = typer.Option(20, min=1, help="Pictures for each value of what a probe varies."),
    template: str | None = TEMPLATE,
    seed: int = typer.Option(0, help="Other pictures for another number."),
    batch_tokens: int | None = typer.Option(
        None, "--batch-tokens", min=1, help="Tokens answered at once; default 8192."
    ),
    out: Path | None = typer.Option(None, help="Folder for probes.json, with every answer, and probes.png."),
    as_json: bool = typer.Option(False, "--json", help="Print the scores as JSON."),
) -> None:
    """Measure hallucination, spatial relations, counting and reading on pictures with exact ground truth.

    Example: anyres probe reading --model runs/tiny/stage2/model --out runs/probes
    """
    # Start-up time: torch and transformers take seconds to import.
    from dataclasses import asdict

    from anyres_vlm.config import template_name
    from anyres_vlm.evaluate.probes.picture import draw_probes
    from anyres_vlm.evaluate.probes.run import PROBES, run_probes
    from anyres_vlm.inference import BATCH_TOKENS, Assistant

    def progress(name: str, answers: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{name}: {answers} answers", end="", file=sys.stderr)

    names = [str(name) for name in dict.fromkeys(probes or PROBES)]
    assistant = Assistant.load(model, template_name(template))
    results = run_probes(assistant, names, count, seed, batch_tokens or BATCH_TOKENS, progress)
    scores = {name: result.scores for name, result in results.items()}
    if sys.stderr.isatty():
        print(file=sys.stderr)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        content = {
            "model": model,
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
