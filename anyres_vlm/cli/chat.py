"""`anyres chat`: ask a checkpoint about images."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from anyres_vlm.errors import UsageError

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
    template: str | None = typer.Option(None, help="Chat template of a checkpoint that has none of its own."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object an answer, with token counts."),
) -> None:
    """Ask a checkpoint about images.

    Example: anyres chat runs/tiny/stage2/model --image sign.png --prompt "What does it say?"
    """
    # Start-up time: torch and transformers take seconds to import.
    from anyres_vlm.config import template_name
    from anyres_vlm.data.images import open_image
    from anyres_vlm.inference import Assistant
    from anyres_vlm.model.generation import Decoding
    from anyres_vlm.serve.chat import ChatSession

    pictures = [open_image(path) for path in image]
    decoding = Decoding(max_new_tokens, temperature, top_p, seed)
    session = ChatSession(Assistant.load(model, template_name(template)), pictures, decoding)
    for question in [prompt] if prompt is not None else _questions():
        _reply(session, question, as_json)


def _questions() -> Iterator[str]:
    """Lines of a pipe or of the terminal, until the end of the input."""
    while True:
        if sys.stdin.isatty():
            print("you: ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


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
    elif sys.stdout.isatty():
        for piece in session.stream(question):
            print(piece, end="", flush=True)
        print()
    else:
        print(session.ask(question).text, flush=True)
