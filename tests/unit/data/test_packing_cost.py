"""FLOPs against torch's own counter on real passes, and costs against figures of published models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from anyres_vlm.checkpoints.bases import build_model
from anyres_vlm.config import RunConfig, load_config, shipped_config
from anyres_vlm.data.loader import Loaded, collate
from anyres_vlm.data.packing.cost import CostModel, Flops, derive_cost, forward_flops, read_cost, training_flops
from anyres_vlm.errors import UsageError
from anyres_vlm.model.vlm import VisionLanguageModel
from anyres_vlm.schema import Batch, ImageRef, Record, Turn
from anyres_vlm.train.recipe import freeze, trained_rates

CLIP_LARGE = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14,
}  # fmt: skip
VICUNA_7B = LlamaConfig(vocab_size=32_064)
QWEN2_05B = Qwen2Config(
    vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
    num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip

Load = Callable[..., list[Loaded]]


def addmm_flops(_: list[int], left: list[int], right: list[int], **shapes: object) -> int:
    """Return the FLOPs of `addmm_`, in place, of which torch's counter only knows the variant out of place."""
    return 2 * left[0] * left[1] * right[1]


class CountedModel:
    """A tiny model, a pack of two documents with three images, and torch's count of FLOPs on it by module."""

    def __init__(self, bases: Path, load_records: Load, tokenizer: PreTrainedTokenizerFast, *settings: str) -> None:
        names = [f"model.llm={bases}/llm", f"model.encoder.name={bases}/vit"]
        self.config: RunConfig = load_config(shipped_config("tiny"), [*names, *settings])
        self.model: VisionLanguageModel = build_model(self.config.model, seed=0)[0]
        Image.effect_noise((70, 40), 90).convert("RGB").save(bases / "picture.png")
        image = ImageRef("picture", bases / "picture.png")
        records = [
            Record("one", (image,), (Turn("user", "<image>\nWhat is it?"), Turn("assistant", "a red star"))),
            Record("two", (image, image), (Turn("user", "<image>\n<image>\nAlike?"), Turn("assistant", "yes"))),
        ]
        loaded = load_records(records, "vicuna_v1", tokenizer, self.model.tiling)
        self.batch: Batch = collate(loaded, self.model.tiling.tile, self.model.image_token_id)
        text, vision = (AutoConfig.from_pretrained(bases / part) for part in ("llm", "vit"))
        self.flops: Flops = forward_flops(text, vision, self.config.model.encoder.layer)
        # torch counts all products of attention, masked ones too; this project counts the visible pairs.
        self.work = {
            "tokens": self.batch.input_ids.numel(),
            "supervised_tokens": self.batch.num_supervised,
            "pairs": int(self.batch.cu_seqlens.diff().square().sum()),
            "tiles": len(self.batch.tiles),
        }

    def count(self, *, backward: bool) -> dict[str, int]:
        """Run the pack and return FLOPs by the module's name, "Global" for the whole."""
        counter = FlopCounterMode(display=False, depth=99, custom_mapping={torch.ops.aten.addmm_: addmm_flops})
        with sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(backward), counter:
            loss = self.model(self.batch)
            if backward:
                loss.backward()
        return {name: sum(by_operator.values()) for name, by_operator in counter.get_flop_counts().items()}


@pytest.mark.parametrize("layer", ["-2", "1", "[-1, 1]"])
def test_forward_flops_are_those_that_torch_counts(
    tiny_bases: Path, load_records: Load, tiny_tokenizer: PreTrainedTokenizerFast, layer: str
) -> None:
    counted = CountedModel(tiny_bases, load_records, tiny_tokenizer, f"model.encoder.layer={layer}")
    found, flops, work = counted.count(backward=False), counted.flops, counted.work
    name = "VisionLanguageModel"
    assert found[f"{name}.vision_tower"] == flops.encoder * work["tiles"]
    assert found[f"{name}.multi_modal_projector"] == flops.projector * work["tiles"]
    assert found[f"{name}.language_model.model"] == flops.token * work["tokens"] + flops.pair * work["pairs"]
    language = found["Global"] - found[f"{name}.vision_tower"] - found[f"{name}.multi_modal_projector"]
    assert language - found[f"{name}.language_model.model"] == flops.head * work["supervised_tokens"]


@pytest.mark.parametrize(
    ("stage", "setting", "first"),
    [
        ("stage1", "seed=0", "multi_modal_projector.linear_1"),
        ("stage2", "seed=0", "multi_modal_projector.linear_1"),
        ("stage2", "stage2.vision_lr=1e-5", "vision_tower.vision_model.embeddings.patch_embedding"),
    ],
    ids=["projector", "language model", "encoder"],
)
def test_training_flops_are_those_that_torch_counts(
    tiny_bases: Path, load_records: Load, tiny_tokenizer: PreTrainedTokenizerFast, stage: str, setting: str, first: str
) -> None:
    """The formula also counts the gradient of the `first` trained layer's input, which autograd leaves out."""
    counted = CountedModel(tiny_bases, load_records, tiny_tokenizer, setting)
    trained = trained_rates(counted.config, stage)
    freeze(counted.model, trained)
    unneeded = counted.count(backward=False)[f"VisionLanguageModel.{first}"]
    expected = counted.count(backward=True)["Global"] + unneeded
    assert training_flops(counted.flops, trained, **counted.work) == expected


@pytest.mark.parametrize(
    ("language", "square", "tile"), [(VICUNA_7B, 2.0e-5, 29), (QWEN2_05B, 4.4e-5, 385)], ids=["7B", "0.5B"]
)
def test_costs_of_known_models(tmp_path: Path, language: object, square: float, tile: float) -> None:
    LlavaNextConfig(text_config=language, vision_config=CLIPVisionConfig(**CLIP_LARGE)).save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        cost = read_cost(path)
        assert cost.square == pytest.approx(square, rel=0.05)
        assert cost.tile == pytest.approx(tile, rel=0.05)


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
