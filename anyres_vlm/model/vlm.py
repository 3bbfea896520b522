"""The vision-language model: its parts, the embedding of a packed sequence, and the forward pass of training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from anyres_vlm.config import ImagePosition, ModelConfig
from anyres_vlm.errors import UsageError
from anyres_vlm.geometry import TilePlan, Tiling
from anyres_vlm.model import attention
from anyres_vlm.model.connector import build_projector, merge_tiles
from anyres_vlm.model.encoder import Encoder
from anyres_vlm.model.loss import summed_loss
from anyres_vlm.schema import Batch

# Configuration keys of transformers models that modify the logits of the head.
LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


class VisionLanguageModel(nn.Module):
    """Encoder, projector, newline and causal language model. State-dict keys are those of released LlavaNext files."""

    def __init__(
        self, config: ModelConfig, vision_tower: Encoder, language_model: PreTrainedModel, image_token_id: int
    ) -> None:
        super().__init__()
        head_config: Any = language_model.config
        if any(getattr(head_config, name, None) not in (None, 1.0) for name in LOGIT_CHANGES):
            raise UsageError(f"{config.llm} caps or scales the logits of its head: choose another llm")
        width: int = head_config.hidden_size
        self.image_token_id = image_token_id
        self.vision_tower = vision_tower
        self.multi_modal_projector = build_projector(config.projector, vision_tower.width, width)
        self.language_model = language_model
        self.language_model.set_attn_implementation(attention.ATTENTION_NAME)
        # standard deviation as in stock LlavaNext
        self.image_newline = nn.Parameter(torch.randn(width) / width**0.5)
        self.cached_features: Callable[[Tensor], Tensor] | None = None  # replaces a frozen encoder
        self.image_position: ImagePosition = "as_is"  # where images stood in the questions of the training data
        self.configure(config)

    def configure(self, config: ModelConfig) -> None:
        """Set a configuration with the same parts; it determines the tiling of images."""
        self.config = config
        self.tiling: Tiling = config.tiling(self.vision_tower.tile, self.vision_tower.patch)

    def embed(
        self, input_ids: Tensor, tiles: Tensor, plans: Sequence[TilePlan], image_positions: Tensor | None = None
    ) -> Tensor:
        """Return token embeddings with image tokens filled in. (1, L), (T, 3, S, S) uint8 -> (1, L, D).

        `image_positions` (N of all images,) are searched in `input_ids` if not given, which waits for the device.
        Without images a blank tile is encoded with weight 0, so the backward pass of every rank uses the same
        parameters.
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
        if image_positions is None:
            image_positions = (input_ids[0] == self.image_token_id).nonzero().squeeze(1)
        assert len(image_positions) == len(visual), "the sample was tokenised with these plans"
        return embedded.index_copy(1, image_positions, visual.to(embedded.dtype)[None])

    def forward(self, batch: Batch) -> Tensor:
        """Return the summed loss of one pack in nats, fp32. The caller divides by the step's supervised tokens."""
        embedded = self.embed(batch.input_ids, batch.tiles, batch.plans, batch.image_positions)
        with attention.separated(self.language_model, batch.cu_seqlens, batch.lengths) as documents:
            hidden = self.language_model.base_model(
                inputs_embeds=embedded, position_ids=batch.position_ids, documents=documents, use_cache=False
            ).last_hidden_state
        return summed_loss(hidden, batch.supervised, batch.targets, self.language_model.get_output_embeddings())
