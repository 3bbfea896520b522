"""`anyres chat`: ask a checkpoint questions about images."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from anyres_vlm.cli.options import DEVICES, LOAD, MODEL, TEMPLATE, Devices, Load, load_assistant
from anyres_vlm.data.headers import read_size
from anyres_vlm.errors import DataError, UsageError

if TYPE_CHECKING:
    from anyres_vlm.serve.chat import ChatSession


def chat(
    model: str = MODEL,
    image: list[Path] = typer.Option([], help="Image for the first question; may be repeated."),
    prompt: str | None = typer.Option(None, help="A single question; default: read questions line by line."),
    max_new_tokens: int = typer.Option(256, min=1, help="Maximum tokens per answer."),
    temperature: float = typer.Option(0.0, min=0.0, help="0 for greedy decoding."),
    top_p: float = typer.Option(
        1.0, "--top-p", min=0.0, max=1.0, help="Sample from the likeliest tokens with this total share."
    ),
    seed: int = typer.Option(0, min=0, help="Seed of the sampling."),
    template: str | None = TEMPLATE,
    load: Load | None = LOAD,
    devices: Devices | None = DEVICES,
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object per answer, with token counts."),
) -> None:
    """Ask a checkpoint about images, in one question or a conversation, on a terminal or over a pipe.

    Commands in a conversation: /image FILE adds an image, /reset starts over, /save FILE.json saves, /help lists them.

    Example: anyres chat runs/tiny/stage2/model --image sign.png --prompt "What does it say?"
    """
    # Start-up time: torch and transformers take seconds to import.
    from anyres_vlm.inference.generation import Decoding
    from anyres_vlm.serve.chat import ChatSession

    for path in image:
        read_size(path)  # fail before loading the model, which may take minutes
    decoding = Decoding(max_new_tokens, temperature, top_p, seed)
    session = ChatSession(load_assistant(model, template, load, devices), decoding)
    for path in image:
        session.add_image(path)
    if prompt is not None:
        _reply(session, prompt, as_json)
        return
    errors = sum(not _handle(session, line, as_json) for line in _lines())
    if errors and not sys.stdin.isatty():
        raise typer.Exit(1)


def _lines() -> Iterator[str]:
    """Yield the nonempty lines of a pipe or of the terminal."""
    if sys.stdin.isatty():
        with suppress(ImportError):  # not on Windows
            import readline  # noqa: F401, gives `input` editing and history
    while True:
        try:
            line = input("you: " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line.strip()


def _handle(session: ChatSession, line: str, as_json: bool) -> bool:
    """Handle one line of a conversation; print an error and return False if there is one."""
    from anyres_vlm.serve.chat import run_command

    try:
        if line.startswith("/"):
            print(run_command(session, line), file=sys.stderr, flush=True)
        else:
            _reply(session, line, as_json)
    except BrokenPipeError:  # the reader of the answers has ended
        raise
    except (UsageError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return False
    except KeyboardInterrupt:  # Ctrl-C ends the answer, or the chat if there is none
        if not sys.stdin.isatty():
            raise
        print("\n(stopped; this question and its answer are not kept)", file=sys.stderr)
    return True


def _reply(session: ChatSession, question: str, as_json: bool) -> None:
    if not question.strip():
        raise UsageError("the prompt is empty: enter a question")
    if as_json:
        answer = session.ask(question)
        print(
            json.dumps(
                {
                    "prompt": question,
                    "answer": answer.text,
                    "prompt_tokens": answer.prompt_tokens,
                    "image_tokens": answer.image_tokens,
                    "new_tokens": answer.new_tokens,
                }
            ),
            flush=True,
        )
        return
    for piece in session.stream(question):
        print(piece, end="", flush=True)
    print(flush=True)
