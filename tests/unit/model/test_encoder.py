"""Features equal an independent computation for every network; no layer after the deepest chosen one runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn
from transformers import CLIPVisionModel

from anyres_vlm.checkpoints.bases import build_model, load_encoder
from anyres_vlm.checkpoints.describe import encoder_geometry
from anyres_vlm.checkpoints.load_save import load_pretrained, save_pretrained
from anyres_vlm.config import EncoderConfig, ModelConfig
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.model.encoder import ClipEncoder, TimmEncoder

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
SMALL = {"depth": 4, "embed_dim": 48, "num_heads": 3}
NETWORKS = {  # name: (img_size and what shrinks it, class and register tokens)
    "vit_tiny_patch16_224": (32, SMALL, 1),
    "vit_small_patch14_dinov2": (28, SMALL, 1),
    "vit_small_patch14_reg4_dinov2": (28, SMALL, 5),
    "vit_base_patch16_clip_224": (32, SMALL, 1),  # a norm before the blocks
    "vit_base_patch16_siglip_224": (32, SMALL, 0),
    "eva02_tiny_patch14_224": (28, SMALL, 1),  # rotary positions
    "deit3_small_patch16_224": (32, SMALL, 1),
    "test_vit": (32, {"depth": 4}, 1),  # of dynamic image size
}


def network(name: str, **more: Any) -> nn.Module:
    tile, options, _ = NETWORKS[name]
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=0, **{"img_size": tile, **options, **more}).eval()


def random_tiles(count: int, side: int) -> Tensor:
    generator = torch.Generator().manual_seed(count * 1000 + side)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def normalised(tiles: Tensor) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (tiles / 255 - mean) / std


def outputs_of(blocks: nn.Module, run: Any) -> list[Tensor]:
    """Return the outputs of the blocks during `run`, in call order."""
    seen: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _m, _i, out: seen.append(out)) for block in blocks.children()]
    run()
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("layer", [-1, -2, 1, (-2, 1), (3, -4, -2), (2, 2)], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
@torch.inference_mode()
def test_timm_features_are_those_of_the_whole_network(name: str, layer: int | tuple[int, ...]) -> None:
    whole, (tile, _, prefix) = network(name), NETWORKS[name]
    tiles = random_tiles(3, tile)
    states = outputs_of(whole.blocks, lambda: whole.forward_features(normalised(tiles)))
    assert len(states) == 4
    named = (layer,) if isinstance(layer, int) else layer
    expected = torch.cat([states[number if number < 0 else number - 1][:, prefix:] for number in named], dim=-1)
    encoder = TimmEncoder(network(name), layer, MEAN, STD)
    features = encoder(tiles)
    torch.testing.assert_close(features, expected)
    assert features.shape == (3, (encoder.tile // encoder.patch) ** 2, encoder.width)
    computed = outputs_of(encoder.vision_model.blocks, lambda: encoder(tiles))
    assert len(computed) == max(number % 5 for number in named)


@pytest.mark.parametrize("layer", [-1, -2, 0, 3, -4, (-2, -1), (3, 0, -2), (1, 1)], ids=str)
@torch.inference_mode()
def test_clip_features_are_transformers_hidden_states(tiny_bases: Path, layer: int | tuple[int, ...]) -> None:
    whole = CLIPVisionModel.from_pretrained(tiny_bases / "vit").eval()
    tiles = random_tiles(2, 28)
    states = whole(pixel_values=normalised(tiles), output_hidden_states=True).hidden_states
    named = (layer,) if isinstance(layer, int) else layer
    encoder = ClipEncoder(whole, layer, MEAN, STD)
    torch.testing.assert_close(encoder(tiles), torch.cat([states[number][:, 1:] for number in named], dim=-1))
    assert encoder.width == 32 * len(named)
    computed = outputs_of(whole.encoder.layers, lambda: encoder(tiles))
    assert len(computed) == max(number % 4 for number in named)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("layer", [-2, (1, 3)], ids=str)
def test_only_unused_parameters_get_no_gradient(tiny_bases: Path, name: str, layer: int | tuple[int, ...]) -> None:
    clip = CLIPVisionModel.from_pretrained(tiny_bases / "vit")
    for encoder in (ClipEncoder(clip, layer, MEAN, STD), TimmEncoder(network(name), layer, MEAN, STD)):
        encoder(random_tiles(1, encoder.tile)).square().sum().backward()
        unused = {id(parameter) for parameter in encoder.unused_parameters()}
        for parameter_name, parameter in encoder.named_parameters():
            assert (parameter.grad is None) == (id(parameter) in unused), parameter_name


@pytest.mark.parametrize(
    ("kind", "layer", "message"),
    [
        ("clip", 4, "layer 4: the encoder has 3 layers, choose from 0 to 3 or from -4 to -1"),
        ("clip", (-2, -5), "layer -5: the encoder has 3 layers"),
        ("timm", 0, "layer 0: the encoder has 4 layers, choose from 1 to 4 or from -4 to -1"),
        ("timm", (1, 5), "layer 5: the encoder has 4 layers"),
    ],
)
def test_layers_out_of_range(tiny_bases: Path, kind: str, layer: Any, message: str) -> None:
    is_clip = kind == "clip"
    vision = CLIPVisionModel.from_pretrained(tiny_bases / "vit") if is_clip else network("vit_tiny_patch16_224")
    with pytest.raises(UsageError, match=message):
        (ClipEncoder if is_clip else TimmEncoder)(vision, layer, MEAN, STD)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": (32, 64)}, "images of 64x32 pixels.*expected squares"),
        ({"patch_size": (16, 8)}, "patches of 8x16: expected squares"),
        ({"img_size": 8}, r"tile of 8 pixels is not a multiple of the patch size of 16: set encoder\.tile=16"),
        ({"img_size": 40}, r"tile of 40 pixels is not a multiple of the patch size of 16: set encoder\.tile=32"),
    ],
)
def test_odd_geometry_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TimmEncoder(network("vit_tiny_patch16_224", **options), -2, MEAN, STD)


def test_a_network_without_an_image_size_is_refused() -> None:
    vision = network("vit_tiny_patch16_224")
    vision.patch_embed.img_size = None
    with pytest.raises(UsageError, match=r"no default image size: set encoder\.tile"):
        TimmEncoder(vision, -2, MEAN, STD)


@pytest.mark.parametrize(
    ("name", "tile", "raised", "message"),
    [
        ("resnet18", None, UsageError, "ResNet is not a plain vision transformer"),
        ("swin_tiny_patch4_window7_224", 224, UsageError, "SwinTransformer is not a plain vision transformer"),
        ("hiera_tiny_224", None, UsageError, "Hiera is not a plain vision transformer"),
        ("naflexvit_base_patch16_gap", None, UsageError, "NaFlexVit is not a plain vision transformer"),
        ("convnext_atto", 64, UsageError, "its tile cannot be set"),
        ("vit_tiny_patch16_224", 8, UsageError, "not a multiple of the patch size"),
        ("vit_nonsense", None, DataError, "Unknown model"),
        ("timm/vit_nonsense", None, DataError, "hf-hub:timm/vit_nonsense"),
    ],
)
def test_names_that_are_not_a_plain_vision_transformer(
    name: str, tile: int | None, raised: type[Exception], message: str
) -> None:
    with pytest.raises(raised, match=message):
        encoder_geometry(EncoderConfig(kind="timm", name=name, tile=tile))


def test_a_folder_of_timm_gives_weights_geometry_and_statistics(tmp_path: Path) -> None:
    saved = network("vit_small_patch14_reg4_dinov2")
    save_for_hf(saved, str(tmp_path), model_args={"img_size": 28, **SMALL}, safe_serialization=True)
    config = EncoderConfig(kind="timm", name=str(tmp_path), layer=(-3, -1))
    encoder = load_encoder(config)
    assert encoder_geometry(config) == (encoder.tile, encoder.patch) == (28, 14)
    pixels = saved.pretrained_cfg
    expected = TimmEncoder(saved, (-3, -1), pixels["mean"], pixels["std"])
    tiles = random_tiles(2, 28)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(tiles), expected(tiles))
    assert encoder_geometry(EncoderConfig(kind="timm", name=str(tmp_path), tile=42)) == (42, 14)


@pytest.mark.parametrize("layer", [-2, (-1, 2)], ids=str)
def test_a_saved_model_loads_back_with_its_timm_encoder(tiny_bases: Path, tmp_path: Path, layer: Any) -> None:
    save_for_hf(
        timm.create_model("test_vit", num_classes=0, img_size=64), str(tmp_path / "vit"), safe_serialization=True
    )
    encoder = EncoderConfig(kind="timm", name=str(tmp_path / "vit"), layer=layer, tile=32)
    config = ModelConfig(llm=str(tiny_bases / "llm"), encoder=encoder, projector="linear", template="vicuna_v1")
    model, tokenizer = build_model(config, seed=0)
    (tmp_path / "model").mkdir()
    save_pretrained(model, model.state_dict(), tokenizer, "", tmp_path / "model")
    again, _ = load_pretrained(tmp_path / "model")
    tiles = random_tiles(2, 32)
    with torch.inference_mode():
        expected = model.multi_modal_projector(model.vision_tower.eval()(tiles))
        assert torch.equal(again.multi_modal_projector(again.vision_tower.eval()(tiles)), expected)


def test_a_model_in_bf16_has_the_cast_weights_and_the_same_buffers(tiny_bases: Path) -> None:
    config = ModelConfig.model_validate(
        {"llm": str(tiny_bases / "llm"), "encoder": {"name": str(tiny_bases / "vit")}, "template": "vicuna_v1"}
    )
    whole, half = (build_model(config, seed=0, dtype=dtype)[0] for dtype in (torch.float32, torch.bfloat16))
    for (name, expected), parameter in zip(whole.named_parameters(), half.parameters(), strict=True):
        assert torch.equal(parameter, expected.bfloat16()), name
    for (name, expected), buffer in zip(whole.named_buffers(), half.named_buffers(), strict=True):
        assert torch.equal(buffer[1], expected), name
