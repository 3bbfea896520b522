"""`anyres rehearse`: try a whole run on small replicas of its models before the real one."""

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

from anyres_vlm.cli.options import CONFIG, SETTINGS
from anyres_vlm.errors import UsageError

if TYPE_CHECKING:  # start-up time
    from anyres_vlm.preflight.rehearse import Tried


def rehearse(
    config: Path | None = CONFIG,
    output: Path | None = typer.Option(
        None, help="Folder of the real run; only checked, never changed. Default: runs/NAME-OF-CONFIG."
    ),
    data: Path | None = typer.Option(None, help="Records to use for both stages, of any kind that training reads."),
    images: Path | None = typer.Option(None, help="Image folder of --data; default: the data's own folder."),
    settings: list[str] = SETTINGS,
) -> None:
    """Try the whole run in minutes, with shrunk models but real files, records and presets.

    Checks the installation, output folder, DeepSpeed presets, base models and data, then trains both stages for a few
    steps, kills and resumes the run, compares the final model with stock transformers and exports it. Problems that
    would stop the real run are listed at the end; the exit status is then 1.

    Example: anyres rehearse --config configs/llava_next_mistral_7b.yaml --output runs/7b
    """
    # Start-up time: torch and transformers take seconds to import.
    from anyres_vlm.config import STAGES, load_config, shipped_config
    from anyres_vlm.preflight.machine import Finding
    from anyres_vlm.preflight.rehearse import Rehearsal, Tried

    if images is not None and data is None:
        raise UsageError("--images needs --data: give both, or set data.images of each stage")
    path = config or shipped_config("tiny")
    replaced = {"path": data, "images": images, "rendered": None, "samples": None, "kinds": None, "index": None}
    flags = {f"{stage}.data.{key}": value for stage in STAGES for key, value in replaced.items()}
    work = Path(tempfile.mkdtemp(prefix="anyres-rehearse-"))
    tried: list[Tried] = []

    def findings() -> Iterator[Tried]:
        try:
            run_config = load_config(path, settings, {} if data is None else flags)
        except UsageError as error:
            yield Tried(Finding("config", "fail", str(error)), 0.0)
        else:
            yield from Rehearsal(run_config, output or Path("runs") / path.stem, work).run()

    # SIGTERM of a batch system must end the training processes, as Ctrl-C does.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        with redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # libraries print and warn
            for one in findings():
                tried.append(one)
                print(f"{one.finding.level:<5} {one.finding.check} ({one.seconds:.1f} s)", file=sys.stderr, flush=True)
    except BaseException:  # interrupted
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
    print(f"found nothing that would stop the run; {sum(one.seconds for one in tried):,.0f} s")


def _print(tried: list[Tried]) -> None:
    """Print a table on a terminal, plain lines elsewhere."""
    if not sys.stdout.isatty():
        for one in tried:
            finding = one.finding
            print(f"{finding.level:<5} {finding.check:<14} {one.seconds:>6.1f} s  {finding.found}")
        return
    from rich.console import Console  # start-up time
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    table = Table("", "check", "s", "found")
    for one in tried:
        finding = one.finding
        level = Text(finding.level, style=colours[finding.level])
        table.add_row(level, finding.check, f"{one.seconds:.1f}", Text(finding.found))
    Console().print(table)
