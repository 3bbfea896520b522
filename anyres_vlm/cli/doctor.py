"""`anyres doctor`: find what would stop a run before it starts."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path

import typer

from anyres_vlm.cli.options import CONFIG, SETTINGS
from anyres_vlm.errors import UsageError


def doctor(
    config: Path | None = CONFIG,
    output: Path | None = typer.Option(None, help="Folder of the run; default: runs/NAME-OF-CONFIG."),
    settings: list[str] = SETTINGS,
    as_json: bool = typer.Option(False, "--json", help="Print the findings as a JSON list."),
) -> None:
    """Check the machine, the installation and the files of a config, with a remedy for each problem.

    Checks Python, torch, devices, attention, gloo and NCCL, DeepSpeed, models, memory, disk, shared memory, data and
    index, and prints a line for each. The exit status is 1 if a check fails.

    Example: anyres doctor --config configs/llava_next_mistral_7b.yaml --output runs/7b
    """
    # Start-up time.
    from anyres_vlm.config import load_config, shipped_config
    from anyres_vlm.preflight import doctor, machine
    from anyres_vlm.preflight.machine import Finding, run_checks

    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    terminal, path = sys.stdout, config or shipped_config("tiny")

    def findings() -> Iterator[Finding]:
        yield from run_checks(machine.CHECKS, None)
        try:
            run_config = load_config(path, settings)
        except UsageError as error:
            yield Finding("config", "fail", str(error))
            return
        yield Finding("config", "ok", str(path))
        yield from run_checks(doctor.CHECKS, doctor.Case(run_config, output or Path("runs") / path.stem))

    found = []
    with redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries print and warn
        for finding in findings():
            found.append(finding)
            if not as_json:
                remedy = f" -> {finding.remedy}" if finding.remedy else ""
                print(f"{finding.level:<5} {finding.check:<14} {finding.found}{remedy}", file=terminal, flush=True)
    if as_json:
        print(json.dumps([asdict(finding) for finding in found], indent=2))
    if any(finding.level == "fail" for finding in found):
        raise typer.Exit(1)
    if not as_json:
        print(f"next:  anyres rehearse --config {path}: tries the whole run in minutes on shrunk models")
