"""What a line that begins with a slash does in the terminal's chat."""

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
    raise UsageError(f"unknown command {name}: /help lists them{did_you_mean(name, list(HELP))}")


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


class ChatSession:
    """The turns so far and the images they speak of; an added image belongs to the next question."""

    def __init__(self, assistant: Assistant, decoding: Decoding) -> None:
        self.assistant, self.decoding = assistant, decoding
        self.reset()

    def reset(self) -> None:
        """Begin a new conversation, without images."""
        self.turns: list[Turn] = []
        self.images: list[Image.Image] = []
        self.image_names: list[str] = []

    def add_image(self, image: Path | ImageRef) -> TilePlan:
        """Show an image with the next question. Raises `DataError` for one that is missing or broken."""
        reference = ImageRef(str(image), image) if isinstance(image, Path) else image
        plan = self.assistant.plan(reference)
        self.images.append(open_image(reference))
        self.image_names.append(blob_name(reference))
        return plan

    def ask(self, question: str) -> Answer:
        """Answer a question in the light of what was said."""
        turns = self._asked(question)
        answer = self.assistant.answer(turns, self.images, self._decoding())
        self.turns = [*turns, Turn("assistant", answer.text)]
        return answer

    def stream(self, question: str, watch: Watch | None = None) -> Iterator[str]:
        """The text of the answer piece by piece; only a whole answer becomes part of the conversation."""
        turns = self._asked(question)
        pieces = []
        for piece in self.assistant.stream(turns, self.images, self._decoding(), watch):
            pieces.append(piece)
            yield piece
        self.turns = [*turns, Turn("assistant", "".join(pieces))]

    def shown(self) -> int:
        """How many of the images a question has come with; the others wait for the next."""
        return sum(turn.text.count(IMAGE_TOKEN) for turn in self.turns)

    def _asked(self, question: str) -> list[Turn]:
        return [*self.turns, Turn("user", f"{IMAGE_TOKEN}\n" * (len(self.images) - self.shown()) + question)]

    def _decoding(self) -> Decoding:
        """Other random numbers in each turn."""
        return replace(self.decoding, seed=self.decoding.seed + len(self.turns))
