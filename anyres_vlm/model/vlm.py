"""The vision-language model: named parts, one forward pass for training, one for generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from anyres_vlm.config import ModelConfig
from anyres_vlm.errors import UsageError
from anyres_vlm.geometry import TilePlan, Tiling
from anyres_vlm.model import attention
from anyres_vlm.model.encoder import Encoder
from anyres_vlm.model.loss import summed_loss
from anyres_vlm.model.merge import merge_tiles
from anyres_vlm.model.projector import build_projector
from anyres_vlm.schema import Batch


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen: greedy at temperature 0, else sampled from the nucleus `top_p`."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0


class VisionLanguageModel(nn.Module):
    """Encoder, projector, newline and causal language model. State-dict names are those of released LlavaNext files."""

    def __init__(
        self, config: ModelConfig, vision_tower: Encoder, language_model: PreTrainedModel, image_token_id: int
    ) -> None:
        super().__init__()
        head_config: Any = language_model.config
        if getattr(head_config, "final_logit_softcapping", None) is not None:
            raise UsageError(f"{config.llm} caps its logits, which the loss does not support: choose another llm")
        width: int = head_config.hidden_size
        self.config = config
        self.image_token_id = image_token_id
        self.vision_tower = vision_tower
        self.multi_modal_projector = build_projector(config.projector, vision_tower.width, width)
        self.language_model = language_model
        self.language_model.set_attn_implementation(attention.ATTENTION_NAME)
        # the deviation of transformers' own LlavaNext
        self.image_newline = nn.Parameter(torch.randn(width) / width**0.5)
        self.tiling: Tiling = config.tiling(vision_tower.tile, vision_tower.patch)
        self.cached_features: Callable[[Tensor], Tensor] | None = None  # what stands in for a frozen encoder

    def embed(self, input_ids: Tensor, tiles: Tensor, plans: Sequence[TilePlan]) -> Tensor:
        """Token embeddings with the images' tokens in place. (1, L), (T, 3, S, S) uint8 -> (1, L, D).

        Without images a blank tile runs at weight zero, so that every rank's backward pass touches the same parameters.
        """
        if not plans:
            tiles = tiles.new_zeros((1, 3, self.vision_tower.tile, self.vision_tower.tile))
        encode = self.cached_features or self.vision_tower
        projected = self.multi_modal_projector(encode(tiles))
        embedded: Tensor = self.language_model.get_input_embeddings()(input_ids)
        if not plans:
            embedded = embedded + 0.0 * (projected.sum() + self.image_newline.sum()).to(embedded.dtype)
            return embedded
        visual = merge_tiles(projected, plans, self.image_newline) + 0.0 * self.image_newline.to(projected.dtype)
        places = input_ids == self.image_token_id
        assert int(places.sum()) == visual.shape[0], "the tokenised sample and the model share the plans"
        merged: Tensor = embedded.masked_scatter(places[..., None], visual.to(embedded.dtype))
        return merged

    def forward(self, batch: Batch) -> Tensor:
        """Summed loss of one pack in nats, fp32. The caller divides by the step's supervised tokens."""
        hidden = self.language_model.base_model(
            inputs_embeds=self.embed(batch.input_ids, batch.tiles, batch.plans),
            position_ids=batch.position_ids,
            cu_seqlens=batch.cu_seqlens,
            longest=int(batch.cu_seqlens.diff().max()),
            use_cache=False,
        ).last_hidden_state
        return summed_loss(hidden, batch.labels, batch.cu_seqlens, self.language_model.get_output_embeddings())

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor,
        tiles: Tensor,
        plans: Sequence[TilePlan],
        decoding: Decoding,
        streamer: Any = None,
    ) -> list[int]:
        """New tokens for one prompt (1, L) with its images, end token left out. `streamer` is one of transformers'."""
        ending: Any = self.language_model.generation_config.eos_token_id
        stops = set(ending) if isinstance(ending, list) else {ending}
        sampling = {"temperature": decoding.temperature, "top_p": decoding.top_p} if decoding.temperature > 0 else {}
        generated = self.language_model.generate(
            inputs_embeds=self.embed(input_ids, tiles, plans),
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=decoding.max_new_tokens,
            do_sample=decoding.temperature > 0,
            streamer=streamer,
            **sampling,
        )
        return [token for token in generated[0].tolist() if token not in stops]
