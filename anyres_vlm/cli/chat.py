"""`anyres chat`: ask a checkpoint about images."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from anyres_vlm.cli.options import DEVICES, LOAD, TEMPLATE, Devices, Load, load_assistant
from anyres_vlm.data.headers import read_size
from anyres_vlm.errors import DataError, UsageError

if TYPE_CHECKING:
    from anyres_vlm.serve.chat import ChatSession


def chat(
    model: str = typer.Argument(..., help="Checkpoint folder, ours or LlavaNext's, or a hub id."),
    image: list[Path] = typer.Option([], help="Image that the first question is about; may be repeated."),
    prompt: str | None = typer.Option(None, help="One question; without it, questions are read line by line."),
    max_new_tokens: int = typer.Option(256, min=1, help="Tokens of an answer at most."),
    temperature: float = typer.Option(0.0, min=0.0, help="0 takes the likeliest token."),
    top_p: float = typer.Option(1.0, "--top-p", min=0.0, max=1.0, help="Sample from this share of likeliest tokens."),
    seed: int = typer.Option(0, min=0, help="Another seed gives other samples."),
    template: str | None = TEMPLATE,
    load: Load | None = LOAD,
    devices: Devices | None = DEVICES,
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object an answer, with token counts."),
) -> None:
    """Ask a checkpoint about images, in one question or a conversation; it works over a pipe, too.

    In a conversation /image FILE shows another image, /reset begins anew, /save FILE.json keeps it, /help lists these.

    Example: anyres chat runs/tiny/stage2/model --image sign.png --prompt "What does it say?"
    """
    # Start-up time: torch and transformers take seconds to import.
    from anyres_vlm.inference.generation import Decoding
    from anyres_vlm.serve.chat import ChatSession

    for path in image:
        read_size(path)  # before the model, which may take minutes to load
    decoding = Decoding(max_new_tokens, temperature, top_p, seed)
    session = ChatSession(load_assistant(model, template, load, devices), decoding)
    for path in image:
        session.add_image(path)
    if prompt is not None:
        _reply(session, prompt, as_json)
        return
    mistakes = sum(not _go_on(session, line, as_json) for line in _lines())
    if mistakes and not sys.stdin.isatty():
        raise typer.Exit(1)


def _lines() -> Iterator[str]:
    """Lines of a pipe or of the terminal that say something, until the end of the input."""
    if sys.stdin.isatty():
        with suppress(ImportError):  # not on Windows
            import readline  # noqa: F401, editing and history for `input`
    while True:
        try:
            line = input("you: " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line.strip()


def _go_on(session: ChatSession, line: str, as_json: bool) -> bool:
    """One line of a conversation, which a mistake does not end; whether there was none."""
    from anyres_vlm.serve.chat import run_command

    try:
        if line.startswith("/"):
            print(run_command(session, line), file=sys.stderr, flush=True)
        else:
            _reply(session, line, as_json)
    except BrokenPipeError:  # nobody reads the answers
        raise
    except (UsageError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return False
    except KeyboardInterrupt:  # ends the answer; without one it ends the chat
        if not sys.stdin.isatty():
            raise
        print("\n(stopped: this question and its answer are forgotten)", file=sys.stderr)
    return True


def _reply(session: ChatSession, question: str, as_json: bool) -> None:
    if not question.strip():
        raise UsageError("the prompt is empty: ask something")
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
