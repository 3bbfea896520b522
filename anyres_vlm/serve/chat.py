"""A conversation with a checkpoint, turn by turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from anyres_vlm.inference import Answer, Assistant
from anyres_vlm.model.vlm import Decoding
from anyres_vlm.schema import IMAGE_TOKEN, Turn


class ChatSession:
    """Keeps the turns so far; the images belong to the first question."""

    def __init__(self, assistant: Assistant, images: Sequence[Image.Image], decoding: Decoding) -> None:
        self.assistant, self.images, self.decoding = assistant, images, decoding
        self.turns: list[Turn] = []

    def ask(self, question: str, streamer: Any = None) -> Answer:
        """Answer a question in the light of what was said; text streams to a streamer of transformers."""
        prefix = "" if self.turns else f"{IMAGE_TOKEN}\n" * len(self.images)
        turns = [*self.turns, Turn("user", prefix + question)]
        answer = self.assistant.answer(turns, self.images, self.decoding, streamer)
        self.turns = [*turns, Turn("assistant", answer.text)]
        return answer
