"""Features of several layers: stock LlavaNext reads the same list and computes the same logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlavaNextForConditionalGeneration

from anyres_vlm.checkpoints.bases import build_model
from anyres_vlm.checkpoints.load_save import load_pretrained, save_pretrained
from anyres_vlm.config import EncoderConfig, ModelConfig
from anyres_vlm.geometry import Size, plan_tiles

LOGITS_ATOL = 2e-6  # none seen in fp32 on CPU; room for other kernels


@pytest.mark.parametrize("layer", [(-2, -3), (3, 1, -2), (-1,), (0, 2)], ids=str)
def test_logits_equal_stock(tiny_bases: Path, tmp_path: Path, layer: tuple[int, ...]) -> None:
    encoder = EncoderConfig(name=str(tiny_bases / "vit"), layer=layer)
    config = ModelConfig(llm=str(tiny_bases / "llm"), encoder=encoder, template="vicuna_v1")
    made, tokenizer = build_model(config, seed=1)
    assert made.multi_modal_projector.linear_1.weight.shape == (48, 32 * len(layer))
    save_pretrained(made, made.state_dict(), tokenizer, "{{ messages }}", tmp_path)
    model, _ = load_pretrained(tmp_path)
    assert model.config.encoder.layer == layer

    stock, outcome = LlavaNextForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(outcome[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    plan = plan_tiles(Size(height=61, width=33), model.tiling)
    generator = torch.Generator().manual_seed(0)
    tiles = torch.randint(0, 256, (plan.num_tiles, 3, 28, 28), dtype=torch.uint8, generator=generator)
    ids = torch.tensor([[1, 9, *[model.image_token_id] * plan.total_tokens, 30, 31]])
    with torch.inference_mode():
        logits = model.language_model(inputs_embeds=model.embed(ids, tiles, [plan])).logits
        expected = stock.eval()(
            input_ids=ids, pixel_values=model.vision_tower.normalise(tiles)[None], image_sizes=torch.tensor([[61, 33]])
        ).logits
    torch.testing.assert_close(logits, expected, atol=LOGITS_ATOL, rtol=0)
