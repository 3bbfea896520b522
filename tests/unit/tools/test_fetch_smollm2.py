"""A GGUF file of a tiny Llama made here becomes an ordinary folder; a tokenizer unfit for chat is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from smollm2 import check_tokenizer, convert, quantisation
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from anyres_vlm.errors import DataError

MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ATOL = 1e-5  # equal in 5 seeds in fp32 on one CPU; another may sum in another order
VOCABULARY = [*MARKS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "he"]
WIDTH, HEADS, KV_HEADS, DEPTH = 32, 4, 2, 2
TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=WIDTH,
            intermediate_size=64,
            num_hidden_layers=DEPTH,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            initializer_range=0.2,
        )
        return LlamaForCausalLM(config).eval()


def write_gguf(gguf: Any, model: LlamaForCausalLM, file: Path) -> None:
    """As llama.cpp's converter does: rows of query and key interleaved, a vocabulary of bytes and one merge."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(DEPTH)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(model.config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3] * len(MARKS) + [1] * (len(VOCABULARY) - len(MARKS)))
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    weights = {name: value.float().numpy() for name, value in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    for layer in range(DEPTH):
        for theirs, ours in TENSORS.items():
            value = weights[f"model.layers.{layer}.{ours}.weight"]
            heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(theirs)
            if heads:
                value = value.reshape(heads, 2, -1, WIDTH).swapaxes(1, 2).reshape(value.shape)
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_becomes_an_ordinary_folder(tmp_path: Path, tiny_llama: LlamaForCausalLM) -> None:
    gguf = pytest.importorskip("gguf")
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    write_gguf(gguf, tiny_llama, tmp_path / "in/tiny.gguf")
    assert quantisation(tmp_path / "in/tiny.gguf") == f"{2 + DEPTH * len(TENSORS)} F32"
    convert(tmp_path / "in/tiny.gguf", tmp_path / "out")

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        for parameter in tiny_llama.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
        torch.testing.assert_close(stored(ids).logits, tiny_llama(ids).logits, atol=ATOL, rtol=0)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.model_max_length == 128
    # GPT-2's rule would keep the second space with the digit; SmolLM's cuts before every digit.
    assert [text for text, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  12")] == [
        "a",
        "ĠĠ",
        "1",
        "2",
    ]


def test_tokenizer_fit_for_chat_passes(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = chat_tokenizer(tiny_tokenizer)
    tokenizer.eos_token = "<|im_end|>"
    check_tokenizer(tokenizer)


def test_tokenizer_that_splits_the_marks_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"splits <\|im_start\|>"):
        check_tokenizer(tiny_tokenizer)


def test_tokenizer_with_another_end_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="the end token is </s>"):
        check_tokenizer(chat_tokenizer(tiny_tokenizer))


def chat_tokenizer(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    return tokenizer
