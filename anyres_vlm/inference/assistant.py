"""Answer questions with a loaded checkpoint, using the same template, tile plans and tiles as in training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import PreTrainedTokenizerFast

from anyres_vlm.checkpoints.load_save import load_pretrained
from anyres_vlm.config import TemplateName
from anyres_vlm.data.conversation import ConversationTokenizer
from anyres_vlm.data.headers import plan_image
from anyres_vlm.data.images import open_image
from anyres_vlm.data.tiling import cut_tiles
from anyres_vlm.errors import UsageError
from anyres_vlm.geometry import Grid, Size, TilePlan, Tiling, plan_tiles
from anyres_vlm.inference.generation import Decoding, Watch, room_for_answer, stream_tokens
from anyres_vlm.inference.placement import Devices, place_model
from anyres_vlm.model.attention import disable_cudnn_attention, has_bf16
from anyres_vlm.model.device import unusable_gpu
from anyres_vlm.model.quantize import Load
from anyres_vlm.model.vlm import VisionLanguageModel
from anyres_vlm.schema import IMAGE_TOKEN, ImageRef, Turn, token_repeats

logger = logging.getLogger(__name__)

FP16_CORES = (7, 0)  # compute capability of Volta: the first with tensor cores, in fp16
BATCH_TOKENS = 8192  # keys and values of a 7B model with 32 heads take 4.3 GB in bf16
INCOMPLETE = "\ufffd"  # decoded from the bytes of an incomplete character


@dataclass(frozen=True)
class Conversation:
    """Turns, the last by the user, and one image for each `<image>` in order: RGB, or a reference to read it from."""

    turns: Sequence[Turn]
    images: Sequence[Image.Image | ImageRef] = ()
    system: str = ""  # replaces the template's system text


@dataclass(frozen=True)
class Answer:
    """The text of an answer, and the number of prompt tokens, image tokens among them, and generated tokens."""

    text: str
    prompt_tokens: int
    image_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Prompt:
    """A tokenised conversation, with the tokens of each image as planned."""

    number: int
    ids: NDArray[np.int64]
    plans: Sequence[TilePlan]
    images: Sequence[Image.Image | ImageRef]


class Assistant:
    """A model and its tokenizer, ready to answer."""

    def __init__(
        self,
        model: VisionLanguageModel,
        tokenizer: PreTrainedTokenizerFast,
        load: Load | None = None,
        devices: Devices | None = None,
    ) -> None:
        disable_cudnn_attention()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        place_model(model, self.device, load, devices)
        self.model = model
        self.tiling = model.tiling
        self.tokenizer = tokenizer
        self.conversation = ConversationTokenizer(model.config.template, tokenizer, model.image_position)

    @classmethod
    def load(
        cls,
        folder: Path | str,
        template: TemplateName | None = None,
        load: Load | None = None,
        devices: Devices | None = None,
    ) -> Assistant:
        """Load a checkpoint folder or hub id, with weights of `inference_dtype`; `template` replaces the checkpoint's.

        `load` holds the decoder in 4 or 8 bits, `devices="auto"` splits it over all GPUs. Raises `DataError` for a
        folder that is not a checkpoint, `UsageError` for a template that cannot be used and a model that does not fit.
        """
        if (fault := unusable_gpu()) is not None:
            logger.warning("answers are computed on the CPU: %s: %s", *fault)
        dtype = inference_dtype(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        assistant = cls(*load_pretrained(folder, template, dtype), load, devices)
        model = assistant.model
        stops = assistant.conversation.stop_ids  # reads the template, so that an error in it is raised here
        if template is not None:
            model.language_model.generation_config.eos_token_id = stops
        return assistant

    def with_grid(self, grid: Grid) -> Assistant:
        """Return the same model with other canvases: up to rows * cols tiles, `1x1` for the thumbnail only."""
        other, own = copy(self), self.tiling
        other.tiling = Tiling.from_grid(grid, tile=own.tile, patch=own.patch, layout=own.layout, dialect=own.dialect)
        return other

    def answer(self, turns: Sequence[Turn], images: Sequence[Image.Image | ImageRef], decoding: Decoding) -> Answer:
        """Answer the last turn, by the user. Raises `UsageError` for a prompt that is too long or lacks an image."""
        (answer,) = self.answer_many([Conversation(turns, images)], decoding)
        return answer

    def stream(
        self,
        turns: Sequence[Turn],
        images: Sequence[Image.Image | ImageRef],
        decoding: Decoding,
        watch: Watch | None = None,
    ) -> Iterator[str]:
        """Yield the text of `answer` in pieces, as soon as they are final."""
        prompt = self.prompt(Conversation(turns, images))
        tokens = (token for _, token in self.tokens([prompt], decoding, watch))
        return text_pieces(self.tokenizer, tokens, self.conversation.lead.strip())

    def answer_many(
        self,
        conversations: Sequence[Conversation],
        decoding: Decoding,
        batch_tokens: int = BATCH_TOKENS,
        progress: Callable[[int], None] | None = None,
    ) -> list[Answer]:
        """Return answers in the order of the conversations, computed in batches of similar length, longest first.

        A batch has at most `batch_tokens` positions, answers and padding included, or a single conversation. Images are
        decoded batch by batch; `progress` is called with the number of answers so far.
        """
        answers: dict[int, Answer] = {}
        for batch in self.answer_batches(conversations, decoding, batch_tokens):
            answers |= batch
            if progress is not None:
                progress(len(answers))
        return [answers[number] for number in range(len(conversations))]

    def answer_batches(
        self, conversations: Sequence[Conversation], decoding: Decoding, batch_tokens: int = BATCH_TOKENS
    ) -> Iterator[dict[int, Answer]]:
        """Yield the batches of `answer_many` as they finish, with answers by conversation number."""
        prompts = [self.prompt(conversation, number) for number, conversation in enumerate(conversations)]
        for batch in _batches(prompts, decoding.max_new_tokens, batch_tokens):
            tokens: list[list[int]] = [[] for _ in batch]
            for place, token in self.tokens(batch, decoding):
                tokens[place].append(token)
            answers: dict[int, Answer] = {}
            for prompt, new in zip(batch, tokens, strict=True):
                text = _decode(self.tokenizer, new).strip().removeprefix(self.conversation.lead.strip()).strip()
                image_tokens = sum(plan.total_tokens for plan in prompt.plans)
                answers[prompt.number] = Answer(text, len(prompt.ids), image_tokens, len(new))
            yield answers

    def plan(self, image: Image.Image | ImageRef) -> TilePlan:
        """Plan the tiles of an image. Raises `DataError` if it is broken or its size is out of range."""
        if isinstance(image, ImageRef):
            return plan_image(image, self.tiling)
        return plan_tiles(Size(height=image.height, width=image.width), self.tiling)

    def prompt(self, conversation: Conversation, number: int = 0) -> Prompt:
        """Tokenise a conversation. Raises `UsageError` for images, turns or a length that the model cannot use."""
        wanted = sum(turn.text.count(IMAGE_TOKEN) for turn in conversation.turns)
        if wanted != len(conversation.images):
            raise UsageError(
                f"the conversation has {wanted} {IMAGE_TOKEN}, but {len(conversation.images)} images are given"
            )
        plans = [self.plan(image) for image in conversation.images]
        prompt = self.conversation.prompt(conversation.turns, conversation.system)
        ids = np.repeat(prompt, token_repeats(prompt, plans, self.model.image_token_id)).astype(np.int64)
        room_for_answer(self.model.language_model, len(ids), 1)  # checked before the first batch runs
        return Prompt(number, ids, plans, conversation.images)

    def tokens(
        self, prompts: Sequence[Prompt], decoding: Decoding, watch: Watch | None = None
    ) -> Iterator[tuple[int, int]]:
        """Yield generated tokens as pairs of the index of the prompt and the token."""
        side = self.tiling.tile
        plans = [plan for prompt in prompts for plan in prompt.plans]
        images = [open_image(i) if isinstance(i, ImageRef) else i for prompt in prompts for i in prompt.images]
        tiles = np.concatenate([np.zeros((0, 3, side, side), np.uint8), *map(cut_tiles, images, plans)])
        return stream_tokens(
            self.model,
            torch.from_numpy(np.concatenate([prompt.ids for prompt in prompts]))[None].to(self.device),
            [len(prompt.ids) for prompt in prompts],
            torch.from_numpy(tiles).to(self.device),
            plans,
            decoding,
            [prompt.number for prompt in prompts],
            watch,
        )


def inference_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of weights for a device: bf16 on a GPU, fp32 on a CPU.

    GPUs below compute capability 8.0 only emulate bf16: they get fp16 where they have tensor cores for it, else fp32,
    and a warning.
    """
    if device.type != "cuda":
        return torch.float32
    if has_bf16(device):
        return torch.bfloat16
    capability = torch.cuda.get_device_capability(device)
    dtype = torch.float16 if capability >= FP16_CORES else torch.float32
    logger.warning(
        "%s has compute capability %d.%d, bf16 needs 8.0: weights are converted to %s, and attention uses SDPA",
        torch.cuda.get_device_name(device),
        *capability,
        str(dtype).removeprefix("torch."),
    )
    return dtype


def text_pieces(tokenizer: PreTrainedTokenizerFast, tokens: Iterable[int], lead: str = "") -> Iterator[str]:
    """Yield the text of tokens as they arrive; the pieces add up to the stripped text of all tokens without `lead`.

    Withheld are incomplete characters, white space until text follows, and any beginning that may be part of `lead`,
    the text that the chat template puts before every answer.
    """
    seen: list[int] = []
    shown = ""
    for token in tokens:
        seen.append(token)
        text = _decode(tokenizer, seen).rstrip(INCOMPLETE).strip()
        if lead.startswith(text):
            continue
        text = text.removeprefix(lead).strip()
        if len(text) > len(shown) and text.startswith(shown):
            yield text[len(shown) :]
            shown = text
    if rest := _decode(tokenizer, seen).strip().removeprefix(lead).strip()[len(shown) :]:
        yield rest


def _decode(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[int]) -> str:
    # Without clean-up, which could change text that has already been yielded.
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _batches(prompts: Sequence[Prompt], new_tokens: int, batch_tokens: int) -> Iterator[list[Prompt]]:
    longest_first = sorted(prompts, key=lambda prompt: -len(prompt.ids))
    while longest_first:
        count = max(1, batch_tokens // (len(longest_first[0].ids) + new_tokens))
        yield longest_first[:count]
        longest_first = longest_first[count:]
