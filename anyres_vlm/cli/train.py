"""`anyres train`: train one stage of the recipe or both, with the embedded default or a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import typer

from anyres_vlm.geometry import Dialect, Layout


def train(
    config: Path | None = typer.Option(None, help="YAML file; the default is the embedded one, configs/tiny.yaml."),
    stage: Literal["1", "2", "all"] = typer.Option("all", help="1 aligns the projector, 2 tunes the language model."),
    grid: str | None = typer.Option(None, help="Largest grid of tiles, ROWSxCOLUMNS; 1x1 is the thumbnail alone."),
    layout: Layout | None = typer.Option(None, help="spatial_unpad or flat."),
    dialect: Dialect | None = typer.Option(None, help="hf or llava."),
    output: Path | None = typer.Option(None, help="Folder of the run; the default is runs/NAME-OF-CONFIG."),
    resume: Literal["auto", "never"] = typer.Option("auto", help="auto resumes from what the output folder holds."),
    max_steps: int | None = typer.Option(
        None, min=1, help="Optimizer steps of each stage at most; a larger number trains a finished stage further."
    ),
    deepspeed: str | None = typer.Option(
        None, help="zero1, zero2, zero2_offload, zero3, zero3_offload or a JSON file, for both stages."
    ),
    skip_stage1: bool = typer.Option(False, "--skip-stage1", help="Ablation: stage 2 on an untrained projector."),
    settings: list[str] = typer.Option([], "--set", metavar="KEY=VALUE", help="Override a key of the config."),
) -> None:
    """Train one stage of the recipe or both.

    Example: anyres train --grid 2x2 --stage 2 --set stage2.learning_rate=1e-5
    """
    from anyres_vlm.train.signals import Watchdog, catch_signals  # start-up time of other commands

    # Before the slow imports: the first step may be minutes away.
    with catch_signals() as signalled, Watchdog() as watchdog:
        # Start-up time: torch and transformers take seconds to import.
        from anyres_vlm.cli.progress import StepProgress
        from anyres_vlm.config import load_config, shipped_config, tiling_flags
        from anyres_vlm.train.options import RunOptions
        from anyres_vlm.train.report import draw_curves
        from anyres_vlm.train.run import train as run_stages

        path = config or shipped_config("tiny")
        presets = {f"{name}.deepspeed": deepspeed for name in ("stage1", "stage2") if deepspeed is not None}
        run_config = load_config(path, settings, {**tiling_flags(grid, layout, dialect), **presets})
        folder = output or Path("runs") / path.stem
        stages: dict[str, tuple[Literal["stage1", "stage2"], ...]] = {
            "1": ("stage1",),
            "2": ("stage2",),
            "all": ("stage2",) if skip_stage1 else ("stage1", "stage2"),
        }
        options = RunOptions(
            folder, stages[stage], resume == "auto", max_steps, skip_stage1, signalled.is_set, watchdog
        )
        with StepProgress() as progress:
            reports = run_stages(run_config, options, progress.update)
    if not reports:
        return
    curves = draw_curves(folder)
    print(f"checkpoint:  {folder / stages[stage][-1] / 'model'}")
    if curves is not None:
        print(f"loss curves: {curves}")
    print(f"next:        anyres chat {folder / stages[stage][-1] / 'model'} --image IMAGE")
