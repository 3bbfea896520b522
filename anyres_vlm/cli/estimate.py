"""`anyres estimate`: memory, time and the cheapest preset that fits, without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from anyres_vlm.cli.options import SETTINGS
from anyres_vlm.errors import UsageError

if TYPE_CHECKING:
    from anyres_vlm.config import StageName


def estimate(
    config: Path | None = typer.Option(None, help="YAML file of the run; default: the embedded default."),
    gpus: int = typer.Option(8, min=1, help="Number of devices, with one rank each."),
    device: str = typer.Option("h100-80gb", help="Device, such as a100-80gb, h200-141gb, l40s-48gb, rtx4090-24gb."),
    index: list[str] = typer.Option(
        [], metavar="[STAGE=]FILE", help="Index of stage 2's data, or stage1=FILE; may be repeated."
    ),
    mfu: float = typer.Option(0.4, min=0.01, max=1.0, help="Share of the device's bf16 peak that a busy rank reaches."),
    headroom: float = typer.Option(
        0.06, min=0.0, max=0.9, help="Share of memory left for fragmentation and errors of the estimate."
    ),
    price: float | None = typer.Option(None, min=0.0, help="Price of a GPU-hour, to print the cost."),
    published: bool = typer.Option(False, "--published", help="Only list published runs and their implied MFU."),
    as_json: bool = typer.Option(False, "--json", help="Print the figures as JSON."),
    settings: list[str] = SETTINGS,
) -> None:
    """Estimate memory and time of a run from its configuration and an index; reads no weights.

    Example: anyres estimate --config configs/llava15_7b.yaml --gpus 8 --device h100-80gb --index index.parquet
    """
    # Start-up time: torch and transformers take seconds to import.
    from anyres_vlm.config import load_config, shipped_config
    from anyres_vlm.preflight.estimate.choice import Machines, estimate_run
    from anyres_vlm.preflight.estimate.published import published_rows
    from anyres_vlm.preflight.estimate.report import describe, describe_published, published_json, to_json
    from anyres_vlm.preflight.estimate.workload import find_device

    if published:
        rows = list(published_rows(mfu))
        print(published_json(rows) if as_json else describe_published(rows, mfu))
        return
    machines = Machines(find_device(device), gpus, headroom, mfu)
    run_config = load_config(config or shipped_config("tiny"), settings)
    estimates = estimate_run(run_config, _indexes(index), machines)
    print((to_json if as_json else describe)(estimates, machines, price))


def _indexes(words: list[str]) -> dict[StageName, Path]:
    found: dict[StageName, Path] = {}
    for word in words:
        stage: StageName = "stage1" if word.startswith("stage1=") else "stage2"
        if stage in found:
            raise UsageError(f"--index {word}: {stage} already has {found[stage]}; for stage 1 write stage1=FILE")
        found[stage] = Path(word.removeprefix(f"{stage}="))
    return found
