"""`anyres rehearse`: a whole run on small replicas of its models, before the real one."""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from anyres_vlm.errors import UsageError

if TYPE_CHECKING:  # start-up time
    from anyres_vlm.preflight.rehearse import Tried


def rehearse(
    config: Path | None = typer.Option(None, help="YAML file; without it the embedded default, configs/tiny.yaml."),
    output: Path | None = typer.Option(
        None, help="Folder of the real run, which is checked and left as it is; without it runs/NAME-OF-CONFIG."
    ),
    data: Path | None = typer.Option(None, help="Records in place of both stages' data, as `anyres index` takes them."),
    images: Path | None = typer.Option(None, help="Image folder of --data; without it, the data's own folder."),
    settings: list[str] = typer.Option([], "--set", metavar="KEY=VALUE", help="Override a key of the config."),
) -> None:
    """Run everything that the real run will, in minutes: its models shrunk, its files, records and presets real.

    Checks the installation, the output folder, DeepSpeed's presets, the base models and the data, then trains both
    stages for a few steps, kills and resumes the run, compares the finished model with stock transformers and exports
    it. The exit status is 1 if anything would stop the real run; each such thing is a line at the end.

    Example: anyres rehearse --config configs/llava_next_mistral_7b.yaml --output runs/7b
    """
    # Start-up time: torch and transformers take seconds to import.
    from anyres_vlm.config import load_config, shipped_config
    from anyres_vlm.preflight.machine import Finding
    from anyres_vlm.preflight.rehearse import Rehearsal, Tried, on_data

    if images is not None and data is None:
        raise UsageError("--images is the image folder of --data: give both, or set the images of each stage's data")
    path = config or shipped_config("tiny")
    work = Path(tempfile.mkdtemp(prefix="anyres-rehearse-"))
    tried: list[Tried] = []

    def everything() -> Iterator[Tried]:
        try:
            run_config = on_data(load_config(path, settings), data, images)
        except UsageError as error:
            yield Tried(Finding("config", "fail", str(error)), 0.0)
        else:
            yield from Rehearsal(run_config, output or Path("runs") / path.stem, work).run()

    # A batch system's SIGTERM must end the training processes as well, as Ctrl-C does.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        with redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # libraries print and warn about themselves
            for one in everything():
                tried.append(one)
                print(f"{one.finding.level:<5} {one.finding.check} ({one.seconds:.1f} s)", file=sys.stderr, flush=True)
    except BaseException:  # interrupted: nobody looks for its files
        shutil.rmtree(work, ignore_errors=True)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    _print(tried)
    failures = [one.finding for one in tried if one.finding.level == "fail"]
    for failure in failures:
        remedy = f" -> {failure.remedy}" if failure.remedy else ""
        print(f"would stop the run: {failure.check}: {failure.found}{remedy}")
    if failures:
        print(f"files of the rehearsal: {work}")
        raise typer.Exit(1)
    shutil.rmtree(work, ignore_errors=True)
    print(f"nothing found that would stop the run; {sum(one.seconds for one in tried):,.0f} s")


def _print(tried: list[Tried]) -> None:
    """A table on a terminal, plain lines elsewhere."""
    if not sys.stdout.isatty():
        for one in tried:
            finding = one.finding
            print(f"{finding.level:<5} {finding.check:<14} {one.seconds:>6.1f} s  {finding.found}")
        return
    from rich.console import Console  # start-up time
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    table = Table("", "tried", "s", "found")
    for one in tried:
        finding = one.finding
        level = Text(finding.level, style=colours[finding.level])
        table.add_row(level, finding.check, f"{one.seconds:.1f}", Text(finding.found))
    Console().print(table)
