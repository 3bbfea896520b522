"""Entry point: registers the commands, and turns errors into one line and an exit status."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence

import typer

from anyres_vlm import __version__
from anyres_vlm.cli.ablate import ablate
from anyres_vlm.cli.chat import chat
from anyres_vlm.cli.doctor import doctor
from anyres_vlm.cli.estimate import estimate
from anyres_vlm.cli.evaluate import evaluate
from anyres_vlm.cli.export import export
from anyres_vlm.cli.import_checkpoint import import_checkpoint
from anyres_vlm.cli.index import index
from anyres_vlm.cli.init import init
from anyres_vlm.cli.instruct import instruct
from anyres_vlm.cli.plan import plan
from anyres_vlm.cli.probe import probe
from anyres_vlm.cli.rehearse import rehearse
from anyres_vlm.cli.render import render
from anyres_vlm.cli.report import report
from anyres_vlm.cli.score import score
from anyres_vlm.cli.tokens import tokens
from anyres_vlm.cli.train import train
from anyres_vlm.cli.web import web
from anyres_vlm.errors import DataError, Interrupted, UsageError

app = typer.Typer(
    name="anyres",
    help="Train, evaluate and serve AnyRes high-resolution vision-language models of the LLaVA-NeXT family.\n\n"
    "Example: anyres train --max-steps 20",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command()(doctor)
app.command()(init)
app.command()(tokens)
app.command()(index)
app.command()(plan)
app.command()(estimate)
app.command()(rehearse)
app.command()(render)
app.command()(train)
app.command("eval")(evaluate)
app.command()(score)
app.command()(probe)
app.command()(report)
app.command()(ablate)
app.command()(chat)
app.command()(web)
app.command("import")(import_checkpoint)
app.command()(export)
app.add_typer(instruct, name="instruct")


@app.callback(invoke_without_command=True)
def options(
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error; may stand anywhere."),
) -> None:
    """Options of every command."""
    if version:
        print(__version__)
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return 0, 2 for wrong usage, 1 for bad data, or 75 if a signal interrupted it."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("anyres_vlm").setLevel(logging.DEBUG if debug else logging.INFO)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        # the launcher `deepspeed` adds --local_rank=N; LOCAL_RANK has the same value
        words = [word for word in given if word != "--debug" and not word.startswith("--local_rank=")]
        app(words, prog_name="anyres")
    except SystemExit as end:  # typer has already printed the reason
        return int(end.code or 0)
    except Interrupted as interruption:
        print(f"interrupted: {interruption}", file=sys.stderr)
        return os.EX_TEMPFAIL
    except (UsageError, DataError, OSError) as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def run() -> None:
    """Run the console script."""
    sys.exit(main())
