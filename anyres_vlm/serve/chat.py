"""A conversation with a checkpoint, turn by turn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from PIL import Image

from anyres_vlm.data.blobs import blob_name
from anyres_vlm.data.images import open_image
from anyres_vlm.geometry import TilePlan
from anyres_vlm.inference import Answer, Assistant
from anyres_vlm.model.generation import Decoding, Watch
from anyres_vlm.schema import IMAGE_TOKEN, ImageRef, Turn


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
