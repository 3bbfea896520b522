"""Folders that stock transformers saved: opened, trained, chatted with and exported. Stock is the oracle of logits."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_stock import JINJA, PINPOINTS, picture, random_stock, save_processor
from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor, SiglipVisionConfig

from anyres_vlm.checkpoints.load_save import load_pretrained
from anyres_vlm.checkpoints.stock import count_changes
from anyres_vlm.cli.main import main
from anyres_vlm.config import shipped_config
from anyres_vlm.data.tiling import cut_tiles
from anyres_vlm.errors import DataError
from anyres_vlm.geometry import Size, Tiling, count_tokens, plan_tiles
from anyres_vlm.inference.assistant import Assistant
from anyres_vlm.inference.generation import Decoding
from anyres_vlm.schema import Turn

LOGITS_ATOL = 2e-5  # worst seen over these folders in fp32 on CPU: 1.1e-5
BF16_RTOL = 0.05  # of the norm of all logits, in bf16; seen on one thread and on two: 0.011
TEXT = "USER: <image> is it a star? ASSISTANT:"


@pytest.fixture(scope="module")
def folder(tiny_tokenizer, tmp_path_factory) -> Path:
    """A plain stock folder with a chat template."""
    made = tmp_path_factory.mktemp("stock")
    random_stock(len(tiny_tokenizer)).save_pretrained(made)
    save_processor(made, tiny_tokenizer, JINJA)
    return made


def assert_equal_logits(folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Our logits of the folder are stock's, its processor's pixels on one side and our tiles on the other."""
    stock, outcome = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(outcome[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model, _ = load_pretrained(folder, "vicuna_v1", dtype)
    image = picture(61, 33)
    inputs = LlavaNextProcessor.from_pretrained(folder)(images=[image], text=TEXT, return_tensors="pt")
    plan = plan_tiles(Size(height=33, width=61), model.tiling)
    with torch.inference_mode():
        embedded = model.embed(inputs["input_ids"], torch.from_numpy(cut_tiles(image, plan)), [plan])
        logits = model.language_model(inputs_embeds=embedded).logits
        expected = stock.eval()(**inputs | {"pixel_values": inputs["pixel_values"].to(dtype)}).logits
    assert logits.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(logits, expected, atol=LOGITS_ATOL, rtol=0)
    else:
        difference = float((logits - expected).float().norm() / expected.float().norm())
        assert difference < BF16_RTOL


@pytest.mark.parametrize(
    ("changes", "extra_rows", "shard"),
    [
        ({}, 0, "5GB"),
        ({"tie_word_embeddings": True}, 0, "5GB"),
        ({}, 36, "60KB"),
        ({"multimodal_projector_bias": False}, 0, "5GB"),
        ({"vision_feature_layer": -1}, 0, "5GB"),
        ({"image_grid_pinpoints": [[56, 84], [28, 56], [84, 56]]}, 0, "5GB"),
    ],
    ids=["plain", "tied", "padded vocabulary in shards", "no projector bias", "last layer", "other pinpoints"],
)
def test_a_stock_folder_gives_stock_s_logits(tiny_tokenizer, tmp_path, changes, extra_rows, shard) -> None:
    model = random_stock(len(tiny_tokenizer) + extra_rows, **changes)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    save_processor(tmp_path, tiny_tokenizer, None, image_grid_pinpoints=changes.get("image_grid_pinpoints", PINPOINTS))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard != "5GB")
    assert_equal_logits(tmp_path)


def test_a_resized_vocabulary(tiny_tokenizer, tmp_path) -> None:
    model = random_stock(200, image_token_index=4)
    model.resize_token_embeddings(len(tiny_tokenizer) + 7)
    model.save_pretrained(tmp_path)
    save_processor(tmp_path, tiny_tokenizer, None)
    assert_equal_logits(tmp_path)


@pytest.mark.parametrize("names", ["released", "in memory"])
def test_names_of_other_releases(folder, tmp_path, names) -> None:
    """Released files keep `vision_model.`, and some hold the names that transformers 4.52 gave the parts in memory."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    changed = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if names == "released":
            changed[name.replace("vision_tower.", "vision_tower.vision_model.")] = tensor
        elif name == "language_model.lm_head.weight":
            changed["lm_head.weight"] = tensor
        else:
            changed[f"model.{name.replace('language_model.model.', 'language_model.')}"] = tensor
    if names == "released":
        changed["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    expected, _ = load_pretrained(folder)
    found, _ = load_pretrained(tmp_path)
    assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in expected.state_dict().items())


def test_a_head_of_its_own_is_not_tied(tiny_tokenizer, tmp_path) -> None:
    """As stock does: what the file holds counts more than the flag."""
    random_stock(len(tiny_tokenizer)).save_pretrained(tmp_path)
    save_processor(tmp_path, tiny_tokenizer, None)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["tie_word_embeddings"] = settings["text_config"]["tie_word_embeddings"] = True
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert_equal_logits(tmp_path)


def test_dtypes_are_kept_where_asked(tiny_tokenizer, tmp_path, capsys) -> None:
    random_stock(len(tiny_tokenizer)).to(torch.bfloat16).save_pretrained(tmp_path / "in")
    save_processor(tmp_path / "in", tiny_tokenizer, JINJA)
    assert_equal_logits(tmp_path / "in", torch.bfloat16)
    assert {p.dtype for p in load_pretrained(tmp_path / "in")[0].parameters()} == {torch.float32}
    wanted = {"kept": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    for name, dtype in wanted.items():
        flags = [] if name == "kept" else ["--dtype", name]
        assert main(["export", str(tmp_path / "in"), str(tmp_path / name), *flags]) == 0
        with safe_open(tmp_path / name / "model.safetensors", "pt") as file:
            assert {file.get_tensor(key).dtype for key in file.keys()} == {dtype}  # noqa: SIM118
        stock = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / name)
        assert {p.dtype for p in stock.parameters()} == {dtype}
    assert_equal_logits(tmp_path / "kept", torch.bfloat16)
    assert_equal_logits(tmp_path / "fp32")
    assert "exists: choose another folder" in (main(["export", "x", str(tmp_path)]), capsys.readouterr().err)[1]


def edit(folder: Path, file: str, **changes: object) -> None:
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy='full' keeps CLS"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act='relu', only 'gelu'"),
        ({"image_grid_pinpoints": [[28, 0]]}, "expected"),
        ({"model_type": "llava"}, "model type 'llava': expected llava_next"),
        ({"model_type": "llava_llama", "mm_projector_type": "linear"}, "`anyres import` reads it"),
        ({"vision_config": SiglipVisionConfig(image_size=28).to_dict()}, "a siglip_vision_model encoder"),
        ({"image_token_index": 7}, "<image> is token 4 of its tokenizer, config.json says 7"),
        ({"vision_feature_layer": "last"}, "not a LlavaNext configuration"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_expressed_is_refused(folder, tmp_path, changes, words) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    edit(tmp_path, "config.json", **changes)
    with pytest.raises(DataError) as caught:
        load_pretrained(tmp_path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"resample": 2}, "resample is 2, expected 3"),
        ({"do_normalize": False}, "do_normalize is False"),
        ({"size": {"shortest_edge": 56}}, "size is 56, expected 28"),
        ({"image_grid_pinpoints": [[28, 56]]}, "image_grid_pinpoints is"),
    ],
)
def test_another_image_processor_is_refused(folder, tiny_tokenizer, tmp_path, changes, words) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    save_processor(tmp_path, tiny_tokenizer, JINJA, **changes)
    with pytest.raises(DataError, match=words):
        load_pretrained(tmp_path)


def test_missing_files_are_named(folder, tiny_tokenizer, tmp_path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match=r"no chat template: name the one .*--template or model\.template"):
        load_pretrained(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": JINJA}))
    assert load_pretrained(tmp_path)[1].chat_template == JINJA
    weights = load_file(tmp_path / "model.safetensors")
    newline = weights.pop("image_newline")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match="weights missing: image_newline"):
        load_pretrained(tmp_path)
    save_file(weights | {"image_newline": newline[:5].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=r"image_newline of shape \(5,\): expected \(48,\)"):
        load_pretrained(tmp_path)
    save_file(weights | {"image_newline": newline, "extra": newline.clone()}, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=r"extra of shape .*no such weight"):
        load_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"pytorch_model\.bin: not a file of torch\.save"):
        load_pretrained(tmp_path)
    (tmp_path / "processor_config.json").unlink()
    with pytest.raises(DataError, match="pixel statistics are unknown"):
        load_pretrained(tmp_path)


# As released folders have them: content as parts, images first, with and without an end token.
PARTS = {
    "vicuna": (
        "{% for m in messages %}{% if m.role != 'system' %}{{ m.role.upper() + ': ' }}{% endif %}"
        "{% for p in m.content | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
        "{% for p in m.content | selectattr('type', 'equalto', 'text') %}{{ p['text'] + ' ' }}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    "mistral": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' }}"
        "{% for p in m.content | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
        "{% for p in m.content | selectattr('type', 'equalto', 'text') %}{{ p['text'] }}{% endfor %}{{ ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content[0].text + '</s> ' }}{% endif %}{% endfor %}"
    ),
}


def with_template(folder: Path, target: Path, file: str, jinja: object) -> Path:
    """The folder with a chat template in this file alone."""
    shutil.copytree(folder, target)
    (target / "chat_template.jinja").unlink()
    if file.endswith(".jinja"):
        (target / file).write_text(str(jinja))
    else:
        old = json.loads((target / file).read_text()) if (target / file).exists() else {}
        (target / file).write_text(json.dumps(old | {"chat_template": jinja}))
    return target


@pytest.mark.parametrize("file", ["chat_template.json", "chat_template.jinja", "processor_config.json"])
@pytest.mark.parametrize("style", PARTS)
def test_a_template_of_parts_gives_stock_s_prompt_and_answer(folder, tmp_path, style, file) -> None:
    made = with_template(folder, tmp_path / "made", file, PARTS[style])
    assistant = Assistant.load(made)
    stock = LlavaNextForConditionalGeneration.from_pretrained(made).eval()
    processor = LlavaNextProcessor.from_pretrained(made)
    pictures = [picture(61, 33), picture(30, 40)]
    for count in (0, 1, 2):
        content = [{"type": "image", "image": image} for image in pictures[:count]]
        asked = [{"role": "user", "content": [*content, {"type": "text", "text": "is it a star?"}]}]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = processor.apply_chat_template(asked, **options)
        turn = Turn("user", "<image>\n" * count + "is it a star?")
        answer = assistant.answer([turn], pictures[:count], Decoding(6))
        assert answer.prompt_tokens == inputs["input_ids"].shape[1]
        ids = stock.generate(**inputs, max_new_tokens=6, do_sample=False)[0, answer.prompt_tokens :]
        assert answer.text == assistant.tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_the_processor_s_files_come_in_transformers_order(folder, tmp_path) -> None:
    made = with_template(folder, tmp_path / "made", "chat_template.json", PARTS["vicuna"])
    (made / "chat_template.jinja").write_text(JINJA)
    found = load_pretrained(made)[1].chat_template
    assert found == PARTS["vicuna"] == LlavaNextProcessor.from_pretrained(made).chat_template
    edit(made, "processor_config.json", chat_template=PARTS["mistral"])
    found = load_pretrained(made)[1].chat_template
    assert found == PARTS["mistral"] == LlavaNextProcessor.from_pretrained(made).chat_template
    edit(made, "processor_config.json", chat_template=3)
    with pytest.raises(DataError, match=r"processor_config\.json: chat_template: expected the text .*, got int"):
        load_pretrained(made)


@pytest.mark.parametrize("style", PARTS)
def test_every_command_takes_a_template_of_parts(folder, tmp_path, capsys, style) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    made = with_template(folder, tmp_path / "made", "chat_template.json", PARTS[style])
    assert main(["render", str(tmp_path / "heldout"), "--count", "22"]) == 0
    data = capsys.readouterr().out.strip()
    picture(61, 33).save(tmp_path / "p.png")
    content = yaml.safe_load(shipped_config("tiny").read_text()) | {"model": {"checkpoint": str(made)}}
    content["stage2"]["data"] = {"path": data}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(content))
    train = ["train", "--config", str(tmp_path / "c.yaml"), "--stage", "2", "--max-steps", "1"]
    assert main([*train, "--output", str(tmp_path / "run")]) == 0
    tuned = tmp_path / "run" / "stage2" / "model"
    assert LlavaNextProcessor.from_pretrained(tuned).chat_template == PARTS[style]
    for model in (made, tuned):
        chat = ["chat", str(model), "--image", str(tmp_path / "p.png"), "--prompt", "what?", "--max-new-tokens", "2"]
        assert main(chat) == 0
    assert main(["eval", "heldout", "--model", str(tuned), "--data", data, "--limit", "2"]) == 0
    assert main(["probe", "reading", "--model", str(tuned), "--count", "1"]) == 0
    assert main(["export", str(tuned), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == PARTS[style]
    assert "grid" not in capsys.readouterr().err


def test_a_template_can_be_named_where_the_folder_has_none(folder, tmp_path, capsys) -> None:
    broken = "{% for m in messages %}{{ m.role }}{% endfor %}"
    assert main(["render", str(tmp_path / "heldout"), "--count", "22"]) == 0
    data = capsys.readouterr().out.strip()
    gqa = tmp_path / "gqa"
    gqa.mkdir()
    picture(61, 33).save(gqa / "1.jpg")
    question = {"imageId": "1", "question": "what?", "isBalanced": True, "answer": "star"}
    question["types"] = {"structural": "query", "semantic": "obj"}
    (gqa / "testdev_balanced_questions.json").write_text(json.dumps({"7": question}))
    for name, jinja, words in (
        ("none", None, "it has no chat template: name the one it was trained with (--template"),
        ("broken", broken, "chat template leaves out or repeats turns: name another template (--template"),
    ):
        made = with_template(folder, tmp_path / name, "chat_template.json", jinja)
        out = tmp_path / f"{name} out"
        for command in (
            ["chat", str(made), "--prompt", "what?", "--max-new-tokens", "2"],
            ["eval", "heldout", "--model", str(made), "--data", data, "--limit", "2"],
            ["eval", "gqa", "--model", str(made), "--data", str(gqa), "--images", str(gqa), "--out", str(out)],
            ["probe", "reading", "--model", str(made), "--count", "1"],
            ["export", str(made), str(tmp_path / f"{name} exported")],
        ):
            if name == "broken" and command[0] != "chat" and command[1] != "gqa":
                continue
            assert main(command) in (1, 2)
            said = capsys.readouterr().err
            assert words in said
            assert "grid" not in said
            assert main([*command, "--template", "tiny"]) == 0
        logs = [path.read_bytes().split(b"\n")[0] for path in out.glob("gqa.log.*")]
        command = ["eval", "gqa", "--model", str(made), "--data", str(gqa), "--images", str(gqa), "--out", str(out)]
        assert main([*command, "--template", "vicuna_v1"]) == 0
        assert [path.read_bytes().split(b"\n")[0] for path in out.glob("gqa.log.*")] != logs, "asked again"
        capsys.readouterr()


def test_a_hub_id_that_cannot_be_reached(monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="nobody/nothing: no such folder, and the download from the hub failed"):
        load_pretrained("nobody/nothing")
    with pytest.raises(DataError, match="no--body/nothing: no such folder"):
        load_pretrained("no--body/nothing")
    with pytest.raises(DataError, match=r"nothing/config\.json: no such file"):
        load_pretrained("../nothing")


def test_stage_2_trains_from_it_and_the_result_is_stock(folder, tmp_path, capsys) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    content = yaml.safe_load(shipped_config("tiny").read_text()) | {"model": {"checkpoint": str(folder)}}
    content["stage2"]["data"]["samples"] = 40
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(content))
    run = tmp_path / "run"
    assert main(["train", "--config", str(config), "--stage", "2", "--max-steps", "2", "--output", str(run)]) == 0
    tuned = run / "stage2" / "model"
    assert_equal_logits(tuned)
    before, after = (load_pretrained(place)[0].state_dict() for place in (folder, tuned))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"language_model", "multi_modal_projector", "image_newline"}
    assert Assistant.load(tuned).model.config.pinpoints == tuple(map(tuple, PINPOINTS))
    card = (tuned / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {"pipeline_tag": "image-text-to-text", "library_name": "transformers"}
    for line in (
        "| samples | 40 |",
        "| steps | 2 |",
        "| learning rate | 0.0006 |",
        "| grids | 1x2, 2x1, 2x2, 3x1, 1x3",
        "| supervised tokens |",
        "## Limitations",
        "at most 56x56 pixels",
        "## Licence",
        "## Evaluation\n\nNo results are recorded",
    ):
        assert line in card
    (run / "stage2" / "eval").mkdir()
    result = {"benchmark": "pope", "score": 85.5, "questions": 9000}
    (run / "stage2" / "eval" / "pope.json").write_text(json.dumps(result))
    (run / "stage2" / "eval" / "pope.answers.jsonl").touch()
    (run / "stage2" / "heldout.json").write_text('{"accuracy": {"sign": 0.25, "all": 0.5}, "answers": []}')
    assert main(["export", str(tuned), str(tmp_path / "out")]) == 0
    exported = (tmp_path / "out" / "README.md").read_text()
    assert "| sign | 25.0% |\n| all | 50.0% |" in exported
    assert "| pope | 85.5 | 9,000 |" in exported
    assert "No results are recorded" not in exported
    assert "## Licence" in exported
    capsys.readouterr()
    assert main(["chat", str(tuned), "--prompt", "what?", "--max-new-tokens", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "what?"


def test_a_config_on_a_checkpoint(folder, tmp_path, capsys) -> None:
    """What is set replaces the checkpoint's own, and its own parts cannot be named."""
    from anyres_vlm.checkpoints.bases import build_model
    from anyres_vlm.checkpoints.describe import describe_model
    from anyres_vlm.config import CheckpointConfig, load_config
    from anyres_vlm.errors import UsageError

    config = CheckpointConfig(checkpoint=str(folder), grid="1x2", template="tiny", layout="flat")
    model, _ = build_model(config, seed=0)
    assert (model.tiling.pinpoints, model.tiling.layout) == (((28, 56), (56, 28)), "flat")
    assert describe_model(config)[:2] == (model.config, model.tiling)
    content = yaml.safe_load(shipped_config("tiny").read_text()) | {"model": {"checkpoint": str(folder), "llm": "x"}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UsageError, match=r"unknown key model\.llm"):
        load_config(tmp_path / "c.yaml")


def test_what_the_dialect_changes_in_stock_is_counted(tiny_tokenizer, tmp_path) -> None:
    pinpoints = Tiling().pinpoints
    assert count_changes(Tiling(pinpoints)) is None
    words = count_changes(Tiling(pinpoints, dialect="llava")) or ""
    found = re.search(r"such as (\d+)x(\d+) .*: ([\d,]+) instead of ([\d,]+)$", words)
    assert found, words
    width, height, stock_count, our_count = (int(number.replace(",", "")) for number in found.groups())
    swapped = [[high, wide] for wide, high in pinpoints]
    side = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    save_processor(tmp_path, tiny_tokenizer, None, image_grid_pinpoints=swapped, **side)
    processor = LlavaNextProcessor.from_pretrained(tmp_path)
    assert processor._get_num_multimodal_tokens([[height, width]])["num_image_tokens"] == [stock_count]
    assert (
        count_tokens(Size(height=height, width=width), Tiling(pinpoints, dialect="llava")) == our_count != stock_count
    )
