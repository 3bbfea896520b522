"""Packed attention compared with an explicit masked softmax, and saved models keeping their attention."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from anyres_vlm.checkpoints.bases import build_model
from anyres_vlm.checkpoints.load_save import save_pretrained
from anyres_vlm.config import ModelConfig
from anyres_vlm.model.attention import ATTENTION_NAME, Documents, packed_attention


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("lengths", [[9], [1, 1, 1], [5, 1, 30, 2]])
def test_attention_stays_inside_documents(groups: int, lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(groups)
    query = torch.randn(1, 4, sum(lengths), 8, generator=generator)
    key, value = torch.randn(2, 1, 4 // groups, sum(lengths), 8, generator=generator)
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    documents = Documents(ends, lengths)
    out, _ = packed_attention(torch.nn.Module(), query, key, value, None, 0.0, 0.3, documents)

    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    visible = (document[:, None] == document) & torch.ones(len(document), len(document)).tril().bool()
    scores = 0.3 * query @ key.repeat_interleave(groups, dim=1).mT
    expected = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value.repeat_interleave(groups, dim=1)
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_saving_a_model_keeps_its_attention(
    tiny_bases: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Regression: saving used to reset it to a default that ignores documents."""
    config = {"llm": str(tiny_bases / "llm"), "encoder": {"name": str(tiny_bases / "vit")}, "template": "vicuna_v1"}
    model, _ = build_model(ModelConfig.model_validate(config), seed=0)
    save_pretrained(model, model.state_dict(), tiny_tokenizer, "", tmp_path)
    assert model.language_model.config._attn_implementation == ATTENTION_NAME
