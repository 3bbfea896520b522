"""Costs derived from transformers configurations, compared with figures of published models."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, Qwen2Config

from anyres_vlm.data.packing.cost import CostModel, derive_cost, forward_flops, read_cost
from anyres_vlm.errors import UsageError

CLIP_LARGE = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14,
}  # fmt: skip
VICUNA_7B = LlamaConfig(vocab_size=32_064)
QWEN2_05B = Qwen2Config(
    vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
    num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("language", "square", "tile"), [(VICUNA_7B, 2.0e-5, 29), (QWEN2_05B, 4.4e-5, 385)], ids=["7B", "0.5B"]
)
def test_costs_of_known_models(tmp_path: Path, language: object, square: float, tile: float) -> None:
    LlavaNextConfig(text_config=language, vision_config=CLIPVisionConfig(**CLIP_LARGE)).save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        cost = read_cost(path)
        assert cost.square == pytest.approx(square, rel=0.05)
        assert cost.tile == pytest.approx(tile, rel=0.05)


def test_costs_of_a_run_by_its_local_folders(tmp_path: Path) -> None:
    VICUNA_7B.save_pretrained(tmp_path / "llm")
    CLIPVisionConfig(**CLIP_LARGE).save_pretrained(tmp_path / "encoder")
    shipped = Path(__file__).parents[3] / "configs" / "llava_next_vicuna_7b.yaml"
    text = shipped.read_text().replace("lmsys/vicuna-7b-v1.5", str(tmp_path / "llm"))
    run = tmp_path / "run.yaml"
    run.write_text(text.replace("openai/clip-vit-large-patch14-336", str(tmp_path / "encoder")))
    assert read_cost(run).tile == pytest.approx(29, rel=0.05)


def test_errors_name_what_cannot_be_derived(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere: no such file; expected a folder with a config\.json"):
        read_cost(tmp_path / "nowhere")
    VICUNA_7B.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="a llama model without text_config and vision_config"):
        read_cost(tmp_path)
    with pytest.raises(UsageError, match="cost of a tile -1"):
        CostModel(2e-5, -1)


def test_several_layers_cost_as_much_as_the_deepest_and_a_wider_projector() -> None:
    vision = CLIPVisionConfig(**CLIP_LARGE)
    one = derive_cost(forward_flops(VICUNA_7B, vision, -2))
    assert derive_cost(forward_flops(VICUNA_7B, vision, (23,))) == one
    wider = 2 * 576 * 1024 * 4096  # FLOPs of 1,024 more inputs of the projector at each of 576 patches
    token = 2 * (32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32_064 * 4096)
    assert derive_cost(forward_flops(VICUNA_7B, vision, (-2, 5))).tile - one.tile == pytest.approx(wider / token)


def test_a_toy_model_has_the_largest_costs() -> None:
    toy = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_attention_heads=4, head_dim=2)
    assert derive_cost(forward_flops(toy, CLIPVisionConfig(**CLIP_LARGE))).square == 1e-3
