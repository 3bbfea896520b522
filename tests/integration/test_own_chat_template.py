"""A run on the tokenizer's own chat template: trained with it, saved with it, answering with it."""

from __future__ import annotations

import shutil
from pathlib import Path

from accelerate.state import AcceleratorState
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

from anyres_vlm.config import load_config, shipped_config
from anyres_vlm.inference.assistant import Assistant
from anyres_vlm.inference.generation import Decoding
from anyres_vlm.schema import Turn
from anyres_vlm.train.options import RunOptions, model_folder
from anyres_vlm.train.run import train

JINJA = (
    "{% for message in messages %}{{ '[' + message.role + ']\\n' + message.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\\n' }}{% endif %}"
)


def test_train_and_answer(tiny_bases: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    shutil.copytree(tiny_bases / "llm", tmp_path / "llm")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llm")
    tokenizer.chat_template = JINJA
    tokenizer.save_pretrained(tmp_path / "llm")
    settings = [
        f"model.llm={tmp_path}/llm",
        f"model.encoder.name={tiny_bases}/vit",
        "model.template=chat_template",
        "stage2.data.samples=8",
        "stage2.batch_size=4",
    ]
    options = RunOptions(tmp_path / "run", ("stage2",), max_steps=1, skip_stage1=True)
    train(load_config(shipped_config("tiny"), settings), options, lambda *step: None)
    folder = model_folder(tmp_path / "run", "stage2")
    assert AutoProcessor.from_pretrained(folder).chat_template == JINJA
    assistant = Assistant.load(folder)
    assert assistant.tokenizer.chat_template == JINJA
    reply = assistant.answer([Turn("user", "what?")], [], Decoding(max_new_tokens=3))
    assert reply.prompt_tokens == len(assistant.tokenizer("[user]\nwhat?</s>[assistant]\n")["input_ids"])
