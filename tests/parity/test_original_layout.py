"""`anyres import` on folders in the original layout; the oracle is stock LlavaNext with weights renamed by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_stock import PINPOINTS, TEXT, VISION, picture, random_stock
from transformers import CLIPVisionConfig, CLIPVisionModel, MistralConfig

from anyres_vlm.checkpoints.load_save import load_pretrained
from anyres_vlm.cli.main import main
from anyres_vlm.data.tiling import cut_tiles
from anyres_vlm.geometry import Size, plan_tiles

LOGITS_ATOL = 2e-5  # seen in fp32 on CPU: equal to the bit
SWAPPED = [[width, height] for height, width in PINPOINTS]
SETTINGS = {
    "architectures": ["LlavaMistralForCausalLM"],
    "model_type": "llava_mistral",
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": SWAPPED,
    "mm_hidden_size": 32,
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "hidden_act": "silu",
    "tokenizer_model_max_length": 4096,
    **TEXT,
}


def stock_model(tokenizer_size: int):
    """The oracle: its text part as a Mistral with the far rotation of SETTINGS."""
    rope = {"rope_type": "default", "rope_theta": 1000000.0}
    text = MistralConfig(**TEXT, vocab_size=tokenizer_size, rope_parameters=rope, sliding_window=None)
    return random_stock(tokenizer_size, seed=3, text_config=text)


@pytest.fixture(scope="module")
def published(tiny_tokenizer, tmp_path_factory) -> tuple[Path, object]:
    """A folder in the original layout in bf16, without its encoder, and the oracle; the tokenizer has no `<image>`."""
    folder = tmp_path_factory.mktemp("published")
    stock = stock_model(len(tiny_tokenizer))
    for parameter in stock.parameters():  # not of the buffers: bf16 would spoil the rotation
        parameter.data = parameter.data.to(torch.bfloat16).float()
    stock.model.vision_tower.save_pretrained(folder / "tower")
    (folder / "tower" / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "CLIPImageProcessor", "image_mean": [0.4] * 3, "image_std": [0.2] * 3})
    )
    tiny_tokenizer.save_pretrained(folder)
    settings = SETTINGS | {"vocab_size": len(tiny_tokenizer), "mm_vision_tower": str(folder / "tower")}
    (folder / "config.json").write_text(json.dumps(settings))
    weights = {"lm_head.weight": stock.lm_head.weight, "model.image_newline": stock.model.image_newline}
    weights |= {f"model.{name}": tensor for name, tensor in stock.model.language_model.state_dict().items()}
    for place, layer in ((0, "linear_1"), (2, "linear_2")):
        part = getattr(stock.model.multi_modal_projector, layer)
        weights |= {f"model.mm_projector.{place}.weight": part.weight, f"model.mm_projector.{place}.bias": part.bias}
    save_file(
        {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in weights.items()},
        folder / "model.safetensors",
    )
    return folder, stock


def clone(published: Path, folder: Path, **changes: object) -> Path:
    """The same folder with changed settings; None takes a key away."""
    folder.mkdir()
    for file in published.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in settings.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


def assert_equals(folder: Path, stock, sizes=((61, 33), (33, 61), (20, 25), (70, 80))) -> None:
    """Logits of the imported folder are the oracle's for the same pixels and canvases."""
    model, tokenizer = load_pretrained(folder)
    assert model.config.dialect == "llava"
    for width, height in sizes:
        image = picture(width, height)
        plan = plan_tiles(Size(height=height, width=width), model.tiling)
        tiles = torch.from_numpy(cut_tiles(image, plan))
        ids = (
            tokenizer("USER: ")["input_ids"] + [model.image_token_id] * plan.total_tokens + tokenizer("x")["input_ids"]
        )
        with torch.inference_mode():
            inputs = torch.tensor([ids])
            logits = model.language_model(inputs_embeds=model.embed(inputs, tiles, [plan])).logits
            expected = stock(
                input_ids=inputs,
                pixel_values=((tiles / 255 - 0.4) / 0.2)[None],
                image_sizes=torch.tensor([[height, width]]),
            ).logits
        torch.testing.assert_close(logits, expected, atol=LOGITS_ATOL, rtol=0)


def run_import(source: Path, out: Path, *more: str) -> int:
    return main(["import", str(source), str(out), *more])


def test_logits_are_those_of_a_conversion_by_hand(published, tmp_path, capsys) -> None:
    folder, stock = published
    out = tmp_path / "out"
    assert run_import(folder, out, "--template", "vicuna_v1") == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert_equals(out, stock)
    weights = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["image_grid_pinpoints"] == PINPOINTS
    assert "Imported by `anyres import`" in (out / "README.md").read_text()
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2]
    assert main(["export", str(out), str(tmp_path / "stock"), "--dtype", "fp32"]) == 0
    assert_equals(tmp_path / "stock", stock)


def test_a_range_of_tiles_is_the_list_that_it_stands_for(published, tmp_path) -> None:
    source = clone(published[0], tmp_path / "in", image_grid_pinpoints="(1x1),...,(2x3)")
    assert run_import(source, tmp_path / "out", "--template", "vicuna_v1") == 0
    model, _ = load_pretrained(tmp_path / "out")
    side = model.vision_tower.tile
    listed = [(side * first, side * second) for first in (1, 2) for second in (1, 2, 3)]
    assert list(model.tiling.pinpoints) == listed
    assert model.image_position == "front", "as its training code puts images"


def test_the_encoder_of_the_weights_counts_more_than_the_tower(published, tmp_path) -> None:
    folder, stock = published
    source = clone(folder, tmp_path / "in", unfreeze_mm_vision_tower=True)
    weights = load_file(source / "model.safetensors")
    assert run_import(source, tmp_path / "x", "--template", "vicuna_v1") == 1, "trained, but not there"
    tower = {
        f"model.vision_tower.vision_tower.vision_model.{n}": t for n, t in stock.model.vision_tower.state_dict().items()
    }
    save_file(weights | {name: tensor.clone() for name, tensor in tower.items()}, source / "model.safetensors")
    torch.manual_seed(9)
    CLIPVisionModel(CLIPVisionConfig(**VISION)).save_pretrained(tmp_path / "other")
    statistics = (folder / "tower" / "preprocessor_config.json").read_text()
    (tmp_path / "other" / "preprocessor_config.json").write_text(statistics)
    assert run_import(source, tmp_path / "out", "--template", "vicuna_v1", "--encoder", str(tmp_path / "other")) == 0
    assert_equals(tmp_path / "out", stock)


def test_an_image_token_that_the_tokenizer_lacks_gets_mean_rows(published, tmp_path) -> None:
    folder, stock = published
    source = clone(folder, tmp_path / "in")
    content = json.loads((source / "tokenizer.json").read_text().replace("<image>", "<other>"))
    (source / "tokenizer.json").write_text(json.dumps(content))
    settings = (source / "tokenizer_config.json").read_text()
    (source / "tokenizer_config.json").write_text(settings.replace("<image>", "<other>"))
    assert run_import(source, tmp_path / "out", "--template", "vicuna_v1") == 0
    model, tokenizer = load_pretrained(tmp_path / "out")
    rows = stock.lm_head.weight.shape[0]
    assert model.image_token_id == tokenizer.convert_tokens_to_ids("<image>") == rows
    head = model.language_model.lm_head.weight
    assert torch.equal(head[:rows], stock.lm_head.weight)
    torch.testing.assert_close(head[rows], head[:rows].mean(0), atol=1e-3, rtol=0)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]["vocab_size"] == rows + 1


@pytest.mark.parametrize("projector", ["mlp2x_gelu", "linear"])
def test_the_flat_layout_and_the_linear_projector(published, tmp_path, capsys, projector) -> None:
    folder, _ = published
    source = clone(folder, tmp_path / "in", mm_patch_merge_type=None, mm_projector_type=projector)
    weights = load_file(source / "model.safetensors")
    del weights["model.image_newline"]
    if projector == "linear":
        weights = {name: tensor for name, tensor in weights.items() if "mm_projector.2" not in name}
        weights = {name.replace("mm_projector.0", "mm_projector"): tensor for name, tensor in weights.items()}
    save_file(weights, source / "model.safetensors")
    assert run_import(source, tmp_path / "out", "--template", "vicuna_v1") == 0
    model, _ = load_pretrained(tmp_path / "out")
    assert (model.tiling.layout, model.config.projector) == ("flat", projector)
    assert plan_tiles(Size(height=27, width=54), model.tiling).total_tokens == 3 * 4
    capsys.readouterr()
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "stock")]) == 2
    assert "cannot be exported: stock LlavaNext has no" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_aspect_ratio": "pad"}, "pads a picture to a square, which is not supported yet: import an AnyRes"),
        ({"image_aspect_ratio": "square"}, "crops a picture to its central square"),
        ({"image_aspect_ratio": None}, "crops a picture to its central square"),
        ({"image_aspect_ratio": "anyres_max_9"}, "image_aspect_ratio='anyres_max_9' shrinks the features of large"),
        ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type='mlp3x_gelu': linear and mlp2x_gelu are supported"),
        ({"mm_patch_merge_type": "spatial"}, "mm_patch_merge_type='spatial'"),
        ({"mm_vision_select_feature": "cls_patch"}, "features with CLS"),
        ({"mm_use_im_start_end": True}, "tokens around an image"),
        ({"mm_resampler_type": "qformer"}, "resamplers"),
        ({"image_grid_pinpoints": "(1x1),...,(6x"}, "expected a list of pairs of pixels"),
        ({"architectures": ["LlavaMptForCausalLM"]}, "architecture 'LlavaMptForCausalLM'"),
        ({"architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next"}, "needs no import"),
        ({"mm_vision_tower": None}, "name the encoder with --encoder"),
        ({"intermediate_size": 10**12}, "numbers, its weights have"),
        ({"num_hidden_layers": 10**9}, "1000000000 layers, its weights have"),
        ({"mm_vision_select_layer": "x"}, "mm_vision_select_layer='x': expected a number"),
        ({"architectures": 5}, "config.json"),
        ({"vocab_size": [1]}, "config.json"),
        ({"vocab_size": 250}, "language_model.lm_head.weight of shape (600, 48)"),
    ],
    ids=str,
)
def test_what_it_cannot_do_is_refused_with_the_reason(published, tmp_path, capsys, changes, words) -> None:
    source = clone(published[0], tmp_path / "in", **changes)
    if "vocab_size" in changes:
        rows = load_file(source / "model.safetensors")
        rows["lm_head.weight"] = torch.cat([rows["lm_head.weight"]] * 2)
        rows["model.embed_tokens.weight"] = torch.cat([rows["model.embed_tokens.weight"]] * 2)
        save_file(rows, source / "model.safetensors")
    if changes.get("model_type") == "llava_next":
        source.joinpath("config.json").write_text(json.dumps(changes))
    assert run_import(source, tmp_path / "out", "--template", "vicuna_v1") == 1
    said = capsys.readouterr().err
    assert words in said
    assert "\n" not in said[said.index("error: ") :].strip()
    assert not (tmp_path / "out").exists()


def test_the_template_and_safetensors_are_required(published, tmp_path, capsys) -> None:
    folder, _ = published
    assert run_import(folder, tmp_path / "out") == 2
    assert "-34b: chatml_direct" in capsys.readouterr().err
    assert run_import(folder, tmp_path / "out", "--template", "vicuna") == 2
    assert "--template 'vicuna': expected one of plain" in capsys.readouterr().err
    source = clone(folder, tmp_path / "in")
    (source / "model.safetensors").rename(source / "pytorch_model-00001-of-00001.bin")
    assert run_import(source, tmp_path / "out", "--template", "mistral") == 1
    assert "pytorch_model-00001-of-00001.bin: not a file of torch.save" in capsys.readouterr().err
