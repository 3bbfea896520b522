"""Replicas of published bases and checkpoints through the whole way: train, save, resume, chat, stock, export."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import replicas
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaNextForConditionalGeneration

from anyres_vlm.cli.main import main
from anyres_vlm.config import load_config, shipped_config
from anyres_vlm.errors import DataError, Interrupted, UsageError
from anyres_vlm.inference.assistant import Assistant, Conversation
from anyres_vlm.inference.generation import Decoding
from anyres_vlm.schema import IMAGE_TOKEN, Turn
from anyres_vlm.train.metrics import read_metrics
from anyres_vlm.train.options import RunOptions, model_folder
from anyres_vlm.train.run import train

TEMPLATES = {
    replicas.VICUNA_7B: "vicuna_v1",
    replicas.VICUNA_13B: "vicuna_v1",
    replicas.LLAMA_2: "llama_2",
    replicas.MISTRAL: "mistral",
    replicas.MISTRAL_WINDOW: "mistral",
    replicas.LLAMA_3: "llama_3",
    replicas.LLAMA_3_FIRST: "llama_3",
    replicas.YI: "chatml_direct",
    replicas.SMOLLM2: "chatml",
    replicas.QWEN2_SMALL: "chatml",
    replicas.QWEN25: "chatml",
}
QUICK = (replicas.VICUNA_7B, replicas.LLAMA_3, replicas.YI, replicas.QWEN2_SMALL)
SLOW = tuple(name for name in replicas.LLMS if name not in QUICK)
DECODING = Decoding(max_new_tokens=5)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return replicas.build_replica(replicas.CLIP, tmp_path_factory.mktemp("clip"))


def settings(*model: str) -> list[str]:
    stages = [
        f"{stage}.{line}"
        for stage in ("stage1", "stage2")
        for line in ("data.samples=12", "max_length=1024", "capacity=1024", "batch_size=4", "packs_per_step=1")
    ]
    return [*model, *stages, "save_every=1", "workers=0"]


def run(output: Path, lines: list[str], stages=("stage1", "stage2"), steps: int = 2, **options) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    config = load_config(shipped_config("tiny"), lines)
    train(config, RunOptions(output, stages, max_steps=steps, **options), lambda *step: None)
    return model_folder(output, stages[-1])


def picture() -> Image.Image:
    return Image.linear_gradient("L").resize((61, 33)).convert("RGB")


def assert_stock_answers_the_same(folder: Path) -> list[int]:
    """Stock transformers and this package read the folder, and give the same greedy tokens for its own template."""
    assistant = Assistant.load(folder)
    stock, report = LlavaNextForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    processor = AutoProcessor.from_pretrained(folder)
    question = "What colour is the star?"
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
        add_generation_prompt=True,
    )
    has_bos = text.startswith(processor.tokenizer.bos_token or "\0")
    inputs = processor(images=picture(), text=text, return_tensors="pt", add_special_tokens=not has_bos)
    prompt = assistant.prompt(Conversation([Turn("user", f"{IMAGE_TOKEN}\n{question}")], [picture()]))
    assert inputs["input_ids"][0].tolist() == prompt.ids.tolist()
    answered = stock.eval().generate(**inputs, do_sample=False, max_new_tokens=DECODING.max_new_tokens)
    tokens = answered[0, inputs["input_ids"].shape[1] :].tolist()
    ends = stock.generation_config.eos_token_id
    ours = [token for _, token in assistant.tokens([prompt], DECODING)]
    assert [token for token in tokens if token not in ends] == ours
    return ends


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_base_from_its_files_to_an_export(name: str, clip: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    base = replicas.build_replica(name, tmp_path / "base")
    lines = settings(f"model.llm={base}", f"model.encoder.name={clip}", f"model.template={TEMPLATES[name]}")
    with pytest.raises(Interrupted, match="stage2 is saved after step 1 of 2"):
        run(tmp_path / "run", lines, is_signalled=lambda: True)
    folder = run(tmp_path / "run", lines)
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "stage2" / "metrics.jsonl")] == [1, 2]
    ends = assert_stock_answers_the_same(folder)
    base_ends = replicas.read_json(base / "generation_config.json")["eos_token_id"]
    assert set(base_ends if isinstance(base_ends, list) else [base_ends]) <= set(ends)
    assert main(["export", str(folder), str(tmp_path / "exported"), "--dtype", "fp16"]) == 0
    assert_stock_answers_the_same(tmp_path / "exported")
    monkeypatch.setattr("sys.stdin", io.StringIO("What colour is the star?\n"))
    assert main(["chat", str(tmp_path / "exported"), "--max-new-tokens", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["prompt_tokens"] > 5


@pytest.mark.parametrize(
    ("name", "template"), [(replicas.NEXT_MISTRAL, "mistral"), (replicas.NEXT_VICUNA, "vicuna_v1")]
)
def test_a_released_checkpoint_is_trained_further(name: str, template: str, tmp_path: Path) -> None:
    released = replicas.build_replica(name, tmp_path / "released")
    assistant = Assistant.load(released, template)
    assert assistant.answer([Turn("user", f"{IMAGE_TOKEN}\nWhat?")], [picture()], DECODING).new_tokens
    lines = settings(f"model={{checkpoint: {released}, template: {template}}}")
    folder = run(tmp_path / "run", lines, ("stage2",), skip_stage1=True)
    ends = assert_stock_answers_the_same(folder)
    assert 2 in ends
    assert load_file(folder / "model.safetensors").keys() >= {"image_newline", "multi_modal_projector.linear_1.weight"}


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_the_original_layout_is_imported_and_trained_further(kind: str, clip: Path, tmp_path: Path) -> None:
    source = replicas.build_replica(replicas.ORIGINAL_NEXT, tmp_path / "source")
    imported = tmp_path / "imported"
    if kind == "bin":  # as LLaVA's own training saves it
        held = {key: tensor for path in source.glob("*.safetensors") for key, tensor in load_file(path).items()}
        for path in source.glob("model*"):
            path.unlink()
        torch.save(held, source / "pytorch_model.bin")
        torch.save({"lr": 1e-3}, source / "training_args.bin")
    flags = ["--template", "vicuna_v1", "--encoder", str(clip)]
    assert main(["import", str(source), str(imported), *flags]) == 0
    weights = load_file(imported / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert_stock_answers_the_same(imported)
    folder = run(tmp_path / "run", settings(f"model={{checkpoint: {imported}}}"), ("stage2",), skip_stage1=True)
    assert_stock_answers_the_same(folder)


@pytest.mark.parametrize(
    ("name", "words"),
    [(replicas.ORIGINAL_15, "image_aspect_ratio='pad'"), (replicas.LLAVA_15, "architecture")],
)
def test_what_is_not_anyres_is_refused_with_the_reason(name: str, words: str, tmp_path: Path, capsys) -> None:
    source = replicas.build_replica(name, tmp_path / "source")
    assert main(["import", str(source), str(tmp_path / "out"), "--template", "vicuna_v1"]) == 1
    assert words in capsys.readouterr().err
    with pytest.raises(DataError, match="model type"):
        Assistant.load(source)


@pytest.mark.parametrize(("window", "fits"), [(64, False), (4096, True)])
def test_a_sample_beyond_the_sliding_window_is_refused_before_a_step(window, fits, clip: Path, tmp_path: Path) -> None:
    base = replicas.build_replica(replicas.MISTRAL_WINDOW, tmp_path / "base")
    config = replicas.read_json(base / "config.json")
    (base / "config.json").write_text(json.dumps(config | {"sliding_window": window}))
    lines = settings(f"model.llm={base}", f"model.encoder.name={clip}", "model.template=mistral")
    if fits:
        assert run(tmp_path / "run", lines, ("stage2",), steps=1, skip_stage1=True).is_dir()
        return
    with pytest.raises(UsageError, match=r"stage2: the longest sample has .* the last 64 only.* stage2\.max_length=64"):
        run(tmp_path / "run", lines, ("stage2",), steps=1, skip_stage1=True)
    assert not (tmp_path / "run" / "stage2" / "metrics.jsonl").exists()
