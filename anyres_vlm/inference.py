"""A loaded checkpoint that answers: the same template, plans and tiles as in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from anyres_vlm.config import TemplateName
from anyres_vlm.data.conversation import ConversationTokenizer
from anyres_vlm.data.tiling import cut_tiles
from anyres_vlm.errors import UsageError
from anyres_vlm.geometry import Size, TilePlan, plan_tiles
from anyres_vlm.model.pretrained import load_pretrained
from anyres_vlm.model.vlm import Decoding, VisionLanguageModel
from anyres_vlm.schema import IMAGE_TOKEN, Turn, token_repeats


@dataclass(frozen=True)
class Answer:
    """What was said, and what the prompt cost: positions in all, those of images, and generated tokens."""

    text: str
    prompt_tokens: int
    image_tokens: int
    new_tokens: int


class Assistant:
    """A model and its tokenizer, ready to answer."""

    def __init__(self, model: VisionLanguageModel, tokenizer: PreTrainedTokenizerFast) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.eval().to(self.device)
        self.tokenizer = tokenizer
        self.conversation = ConversationTokenizer(model.config.template, tokenizer)

    @classmethod
    def load(cls, folder: Path | str, template: TemplateName | None = None) -> Assistant:
        """From a checkpoint folder or hub id; `template` replaces its own. Raises `DataError` if it is none."""
        assistant = cls(*load_pretrained(folder, template))
        if template is not None:
            assistant.model.language_model.generation_config.eos_token_id = assistant.conversation.stop_ids
        return assistant

    def answer(
        self, turns: Sequence[Turn], images: Sequence[Image.Image], decoding: Decoding, streamer: Any = None
    ) -> Answer:
        """Answer the last turn, the user's. RGB images stand for the `<image>` of the turns, in order."""
        wanted = sum(turn.text.count(IMAGE_TOKEN) for turn in turns)
        if wanted != len(images):
            raise UsageError(f"the conversation has {wanted} {IMAGE_TOKEN}, but {len(images)} images are given")
        plans = [plan_tiles(Size(height=image.height, width=image.width), self.model.tiling) for image in images]
        prompt = self.conversation.prompt(turns)
        ids = np.repeat(prompt, token_repeats(prompt, plans, self.model.image_token_id)).astype(np.int64)
        new = self.model.generate(
            torch.from_numpy(ids)[None].to(self.device), self._tiles(images, plans), plans, decoding, streamer
        )
        text = str(self.tokenizer.decode(new, skip_special_tokens=True)).strip()
        return Answer(text, len(ids), sum(plan.total_tokens for plan in plans), len(new))

    def _tiles(self, images: Sequence[Image.Image], plans: Sequence[TilePlan]) -> torch.Tensor:
        side = self.model.tiling.tile
        tiles = [np.zeros((0, 3, side, side), np.uint8), *map(cut_tiles, images, plans)]
        return torch.from_numpy(np.concatenate(tiles)).to(self.device)
