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
from transformers import AutoProcessor, LlavaNextForConditionalGeneration

from anyres_vlm.cli.main import main
from anyres_vlm.config import load_config, shipped_config
from anyres_vlm.inference import Assistant, Conversation
from anyres_vlm.model.generation import Decoding
from anyres_vlm.schema import IMAGE_TOKEN, Turn
from anyres_vlm.train.options import RunOptions, model_folder
from anyres_vlm.train.run import train

RECIPES = {
    replicas.VICUNA_7B: "llava_next_vicuna_7b",
    replicas.VICUNA_13B: "llava_next_13b",
    replicas.MISTRAL: "llava_next_mistral_7b",
    replicas.LLAMA_3: "llava_next_llama3_8b",
    replicas.YI: "llava_next_34b",
}
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
    prompt = assistant._prompt(Conversation([Turn("user", f"{IMAGE_TOKEN}\n{question}")], [picture()]))
    assert inputs["input_ids"][0].tolist() == prompt.ids.tolist()
    answered = stock.eval().generate(**inputs, do_sample=False, max_new_tokens=DECODING.max_new_tokens)
    tokens = answered[0, inputs["input_ids"].shape[1] :].tolist()
    ends = stock.generation_config.eos_token_id
    ours = [token for _, token in assistant._tokens([prompt], DECODING)]
    assert [token for token in tokens if token not in ends] == ours
    return ends


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_base_from_its_files_to_an_export(name: str, clip: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    base = replicas.build_replica(name, tmp_path / "base")
    lines = settings(f"model.llm={base}", f"model.encoder.name={clip}", f"model.template={TEMPLATES[name]}")
    stopped = run(tmp_path / "run", lines, ("stage1",), steps=2)
    folder = run(tmp_path / "run", lines)
    ends = assert_stock_answers_the_same(folder)
    base_ends = replicas.read_json(base / "generation_config.json")["eos_token_id"]
    assert set(base_ends if isinstance(base_ends, list) else [base_ends]) <= set(ends)
    assert main(["export", str(folder), str(tmp_path / "exported"), "--dtype", "fp16"]) == 0
    assert_stock_answers_the_same(tmp_path / "exported")
    monkeypatch.setattr("sys.stdin", io.StringIO("What colour is the star?\n"))
    assert main(["chat", str(tmp_path / "exported"), "--max-new-tokens", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["prompt_tokens"] > 5
    assert stopped.is_dir()
