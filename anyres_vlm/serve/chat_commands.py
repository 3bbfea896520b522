"""What a line that begins with a slash does in the terminal's chat."""

from __future__ import annotations

import json
import shlex
from difflib import get_close_matches
from pathlib import Path

from anyres_vlm.errors import UsageError
from anyres_vlm.schema import Role
from anyres_vlm.serve.chat import ChatSession
from anyres_vlm.serve.tiling_table import describe_plan

HELP = {
    "/image": "/image FILE      show an image with the next question; for several, again",
    "/reset": "/reset           begin a new conversation, without images",
    "/save": "/save FILE.json  write the conversation as a record of LLaVA's JSON",
    "/help": "/help            this list; the end of the input (Ctrl-D) ends the chat",
}
SPEAKERS: dict[Role, str] = {"user": "human", "assistant": "gpt"}


def run_command(session: ChatSession, line: str) -> str:
    """Carry out a command and return what to say. Raises `UsageError`, or `DataError` for a bad image."""
    try:
        name, *arguments = shlex.split(line)
    except ValueError as error:
        raise UsageError(f"{line}: {error}: close it, or write a backslash before it") from None
    if name == "/image" and len(arguments) == 1:
        path = Path(arguments[0]).expanduser()
        return f"{path}: {describe_plan(session.add_image(path))}"
    if name == "/save" and len(arguments) == 1:
        return _save(session, Path(arguments[0]).expanduser())
    if name == "/reset" and not arguments:
        session.reset()
        return "a new conversation"
    if name == "/help":
        return "\n".join(HELP.values())
    if name in HELP:
        raise UsageError(f"{line}: expected {HELP[name].partition('  ')[0]}")
    near = get_close_matches(name, HELP, 1)
    raise UsageError(f"unknown command {name}: {f'did you mean {near[0]}? ' if near else ''}/help lists them")


def _save(session: ChatSession, path: Path) -> str:
    """One record that training and `anyres index` read; images below the file's folder are named from there."""
    if path.suffix != ".json":
        raise UsageError(f"/save {path}: expected a name that ends in .json")
    if not session.turns:
        raise UsageError(f"/save {path}: nothing was said yet: ask something first")
    folder = path.absolute().parent
    files = [Path(name).absolute() for name in session.image_names[: session.shown()]]
    record = {
        "id": path.stem,
        "image": [str(file.relative_to(folder) if file.is_relative_to(folder) else file) for file in files],
        "conversations": [{"from": SPEAKERS[turn.role], "value": turn.text} for turn in session.turns],
    }
    path.write_text(json.dumps([record], indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return f"saved {len(session.turns) // 2} questions and answers as {path}"
