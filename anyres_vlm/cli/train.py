"""`anyres train`: train one stage of the recipe or both, from a configuration or the embedded default."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import typer

from anyres_vlm.cli.options import CONFIG, DIALECT, GRID, LAYOUT, SETTINGS
from anyres_vlm.geometry import Dialect, Layout


def train(
    config: Path | None = CONFIG,
    stage: Literal["1", "2", "all"] = typer.Option("all", help="1 trains the projector, 2 also the language model."),
    grid: str | None = GRID,
    layout: Layout | None = LAYOUT,
    dialect: Dialect | None = DIALECT,
    output: Path | None = typer.Option(None, help="Folder of the run; default: runs/NAME-OF-CONFIG."),
    resume: Literal["auto", "never"] = typer.Option("auto", help="auto resumes from the last checkpoint."),
    max_steps: int | None = typer.Option(
        None, min=1, help="Maximum optimizer steps per stage; a larger number continues a finished stage."
    ),
    deepspeed: str | None = typer.Option(
        None, help="zero1, zero2, zero2_offload, zero3, zero3_offload or a JSON file, for both stages."
    ),
    skip_stage1: bool = typer.Option(False, "--skip-stage1", help="Ablation: run stage 2 with an untrained projector."),
    settings: list[str] = SETTINGS,
) -> None:
    """Train one stage of the recipe or both.

    Example: anyres train --grid 2x2 --stage 2 --set stage2.learning_rate=1e-5
    """
    from anyres_vlm.train.signals import Watchdog, catch_signals  # start-up time of other commands

    # Before the slow imports, as a signal may arrive during them.
    with catch_signals() as signalled, Watchdog() as watchdog:
        # Start-up time: torch and transformers take seconds to import.
        from anyres_vlm.cli.progress import show_steps
        from anyres_vlm.config import STAGES, StageName, load_config, shipped_config, tiling_flags
        from anyres_vlm.train.options import RunOptions
        from anyres_vlm.train.report import draw_curves
        from anyres_vlm.train.run import train as run_stages

        path = config or shipped_config("tiny")
        presets = {f"{name}.deepspeed": deepspeed for name in STAGES if deepspeed is not None}
        run_config = load_config(path, settings, {**tiling_flags(grid, layout, dialect), **presets})
        folder = output or Path("runs") / path.stem
        stages: dict[str, tuple[StageName, ...]] = {
            "1": ("stage1",),
            "2": ("stage2",),
            "all": ("stage2",) if skip_stage1 else STAGES,
        }
        options = RunOptions(
            folder, stages[stage], resume == "auto", max_steps, skip_stage1, signalled.is_set, watchdog
        )
        with show_steps() as progress:
            reports = run_stages(run_config, options, progress)
    if not reports:
        return
    curves = draw_curves(folder)
    print(f"checkpoint:  {folder / stages[stage][-1] / 'model'}")
    if curves is not None:
        print(f"loss curves: {curves}")
    print(f"next:        anyres chat {folder / stages[stage][-1] / 'model'} --image IMAGE")
