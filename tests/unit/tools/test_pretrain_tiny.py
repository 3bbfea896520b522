"""Text pretraining: the documents of a pack do not attend to each other."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from anyres_vlm.model.attention import ATTENTION_NAME


def test_the_loss_of_a_pack_is_that_of_its_documents_alone() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=50, initializer_range=0.5))
    model.set_attn_implementation(ATTENTION_NAME)
    documents = [(list(range(1, 9)), list(range(1, 9))), (list(range(9, 21)), list(range(9, 21)))]
    with torch.inference_mode():
        together = float(tiny.text_loss(model, *tiny.pack(documents)))
        alone = [float(tiny.text_loss(model, *tiny.pack([document]))) for document in documents]
    assert together * 20 == pytest.approx(alone[0] * 8 + alone[1] * 12, rel=1e-3)  # each is a mean over its labels
