"""A conversation with a checkpoint, turn by turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from PIL import Image

from anyres_vlm.inference import Answer, Assistant
from anyres_vlm.model.generation import Decoding
from anyres_vlm.schema import IMAGE_TOKEN, Turn


class ChatSession:
    """Keeps the turns so far; the images belong to the first question."""

    def __init__(self, assistant: Assistant, images: Sequence[Image.Image], decoding: Decoding) -> None:
        self.assistant, self.images, self.decoding = assistant, images, decoding
        self.turns: list[Turn] = []

    def ask(self, question: str) -> Answer:
        """Answer a question in the light of what was said."""
        turns = self._asked(question)
        answer = self.assistant.answer(turns, self.images, self._decoding())
        self.turns = [*turns, Turn("assistant", answer.text)]
        return answer

    def stream(self, question: str) -> Iterator[str]:
        """The text of the answer piece by piece; only a whole answer becomes part of the conversation."""
        turns = self._asked(question)
        pieces = []
        for piece in self.assistant.stream(turns, self.images, self._decoding()):
            pieces.append(piece)
            yield piece
        self.turns = [*turns, Turn("assistant", "".join(pieces))]

    def _asked(self, question: str) -> list[Turn]:
        prefix = "" if self.turns else f"{IMAGE_TOKEN}\n" * len(self.images)
        return [*self.turns, Turn("user", prefix + question)]

    def _decoding(self) -> Decoding:
        """Other random numbers in each turn."""
        return replace(self.decoding, seed=self.decoding.seed + len(self.turns))
