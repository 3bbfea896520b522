"""`anyres ablate`: train and measure a grid of runs from one YAML file, and compare them in a table."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from anyres_vlm.cli.evaluate import evaluate
from anyres_vlm.cli.probe import probe
from anyres_vlm.errors import DataError, UsageError

if TYPE_CHECKING:
    from anyres_vlm.ablate.jobs import Job, SweepRun

MEASURES = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
"""Commands that a sweep may use as measures, only to parse their options."""
MEASURES.command("eval")(wraps(evaluate)(lambda **options: None))
MEASURES.command("probe")(wraps(probe)(lambda **options: None))


def ablate(
    config: Path = typer.Argument(..., help="YAML file of the sweep, such as configs/ablation_tiny.yaml."),
    out: Path | None = typer.Option(None, help="Folder of the sweep; default: runs/NAME-OF-CONFIG."),
    table: bool = typer.Option(False, "--table", help="Only write the table of finished runs."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Only list the runs and the stages they share."),
) -> None:
    """Train and measure every combination of a sweep. A rerun resumes; several processes share the work.

    Example: anyres ablate configs/ablation_tiny.yaml
    """
    # Start-up time.
    from anyres_vlm.ablate.jobs import SweepRun
    from anyres_vlm.ablate.sweep import expand, read_sweep
    from anyres_vlm.train.signals import catch_signals

    sweep = read_sweep(config)
    for measure in sweep.measure:
        _check(measure.run, has_data=measure.rendered is not None)
    cells = expand(sweep)
    with catch_signals() as signalled:
        run = SweepRun(sweep, out or Path("runs") / config.stem, signalled.is_set)
        jobs = run.jobs(cells)
        if dry_run:
            for job in jobs:
                shared = "".join(f"  after stage 1 {need.folder.name}" for need in job.needs)
                print(f"{'done' if job.is_done() else 'open'}  {job.folder.name}{shared}")
            return
        failed = [] if table or all(job.is_done() for job in jobs) else _work(run, jobs)
    _report(run)
    if failed:
        raise DataError(f"{len(failed)} of {len(jobs)} runs failed; see {failed[0].folder}/log.txt of the first")


def _work(run: SweepRun, jobs: list[Job]) -> list[Job]:
    # Child processes inherit these imports, which take seconds.
    import anyres_vlm.evaluate.probes.suite
    import anyres_vlm.train.run  # noqa: F401
    from anyres_vlm.ablate.jobs import work

    return work(jobs, run.pause)


def _report(run: SweepRun) -> None:
    from anyres_vlm.ablate.table import draw_table, make_table, markdown
    from anyres_vlm.files import replacing

    made = make_table(run)
    run.out.mkdir(parents=True, exist_ok=True)
    for name, text in (("table.json", json.dumps(asdict(made), indent=1) + "\n"), ("table.md", markdown(made))):
        with replacing(run.out / name) as file:
            file.write(text)
    drawn = draw_table(made, run.out / "table.png")
    print(markdown(made))
    print(f"table: {run.out / 'table.md'}, {run.out / 'table.json'}" + ("" if drawn is None else f", {drawn}"))


def _check(command: str, has_data: bool) -> None:
    """Raise `UsageError` before hours of training if the command would reject the measure's options."""
    words = [*shlex.split(command), "--model", "MODEL", "--json", *(["--data", "DATA"] if has_data else [])]
    try:
        MEASURES(words, prog_name="anyres")
    except SystemExit as end:  # typer always exits, and has printed the error
        if end.code:
            raise UsageError(f"measure {command!r} is not a command of anyres (see above)") from None
