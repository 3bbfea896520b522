"""Chat session with a model, and the slash commands of the terminal chat."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from PIL import Image

from anyres_vlm.data.blobs import blob_name
from anyres_vlm.data.images import open_image
from anyres_vlm.data.tile_picture import describe_plan
from anyres_vlm.errors import UsageError, did_you_mean
from anyres_vlm.geometry import TilePlan
from anyres_vlm.inference.assistant import Answer, Assistant
from anyres_vlm.inference.generation import Decoding, Watch
from anyres_vlm.schema import IMAGE_TOKEN, ImageRef, Role, Turn

HELP = {
    "/image": "/image FILE      add an image to the next question; repeat for several",
    "/reset": "/reset           start a new conversation without images",
    "/save": "/save FILE.json  save the conversation as LLaVA JSON",
    "/help": "/help            show this list; Ctrl-D ends the chat",
}
SPEAKERS: dict[Role, str] = {"user": "human", "assistant": "gpt"}


def run_command(session: ChatSession, line: str) -> str:
    """Run a command and return its message. Raises `UsageError`, or `DataError` for a bad image."""
    try:
        name, *arguments = shlex.split(line)
    except ValueError as error:
        raise UsageError(f"{line}: {error}: close or escape it with a backslash") from None
    if name == "/image" and len(arguments) == 1:
        path = Path(arguments[0]).expanduser()
        return f"{path}: {describe_plan(session.add_image(path))}"
    if name == "/save" and len(arguments) == 1:
        return _save(session, Path(arguments[0]).expanduser())
    if name == "/reset" and not arguments:
        session.reset()
        return "new conversation"
    if name == "/help":
        return "\n".join(HELP.values())
    if name in HELP:
        raise UsageError(f"{line}: expected {HELP[name].partition('  ')[0]}")
    raise UsageError(f"unknown command {name}: /help lists them{did_you_mean(name, list(HELP))}")


def _save(session: ChatSession, path: Path) -> str:
    """Write a record for training and `anyres index`; paths of images in the file's folder are relative to it."""
    if path.suffix != ".json":
        raise UsageError(f"/save {path}: expected a name ending in .json")
    if not session.turns:
        raise UsageError(f"/save {path}: the conversation is empty: ask a question first")
    folder = path.absolute().parent
    files = [Path(name).absolute() for name in session.image_names[: session.shown()]]
    record = {
        "id": path.stem,
        "image": [str(file.relative_to(folder) if file.is_relative_to(folder) else file) for file in files],
        "conversations": [{"from": SPEAKERS[turn.role], "value": turn.text} for turn in session.turns],
    }
    path.write_text(json.dumps([record], indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return f"saved {len(session.turns) // 2} questions and answers as {path}"


class ChatSession:
    """The turns of a conversation and their images; an added image belongs to the next question."""

    def __init__(self, assistant: Assistant, decoding: Decoding) -> None:
        self.assistant, self.decoding = assistant, decoding
        self.reset()

    def reset(self) -> None:
        """Start a new conversation without images."""
        self.turns: list[Turn] = []
        self.images: list[Image.Image] = []
        self.image_names: list[str] = []

    def add_image(self, image: Path | ImageRef) -> TilePlan:
        """Add an image to the next question. Raises `DataError` if it is missing or broken."""
        reference = ImageRef(str(image), image) if isinstance(image, Path) else image
        plan = self.assistant.plan(reference)
        self.images.append(open_image(reference))
        self.image_names.append(blob_name(reference))
        return plan

    def ask(self, question: str) -> Answer:
        """Answer a question in the context of the conversation."""
        turns = self._turns_with(question)
        answer = self.assistant.answer(turns, self.images, self._decoding())
        self.turns = [*turns, Turn("assistant", answer.text)]
        return answer

    def stream(self, question: str, watch: Watch | None = None) -> Iterator[str]:
        """Yield the answer in pieces; only a complete answer is added to the conversation."""
        turns = self._turns_with(question)
        pieces = []
        for piece in self.assistant.stream(turns, self.images, self._decoding(), watch):
            pieces.append(piece)
            yield piece
        self.turns = [*turns, Turn("assistant", "".join(pieces))]

    def shown(self) -> int:
        """Return the number of images in questions so far; the others belong to the next question."""
        return sum(turn.text.count(IMAGE_TOKEN) for turn in self.turns)

    def _turns_with(self, question: str) -> list[Turn]:
        return [*self.turns, Turn("user", f"{IMAGE_TOKEN}\n" * (len(self.images) - self.shown()) + question)]

    def _decoding(self) -> Decoding:
        """Return the decoding settings with a different seed for each turn."""
        return replace(self.decoding, seed=self.decoding.seed + len(self.turns))
