"""Sizes of published models: parameters counted on the meta device beside those that their authors tell."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel

from anyres_vlm.checkpoints.bases import skeleton
from anyres_vlm.checkpoints.describe import describe_bases, known_sizes
from anyres_vlm.config import EncoderConfig, ModelConfig, load_config, shipped_config
from anyres_vlm.errors import DataError

# Elements of the safetensors files of llava-hf/llava-1.5-7b-hf as the hub counts them: no newline, 32,064 words.
LLAVA_15_7B = 7_063_427_072


def model_config(llm: str, encoder: str = "openai/clip-vit-large-patch14-336") -> ModelConfig:
    return ModelConfig(llm=llm, encoder=EncoderConfig(name=encoder), template="vicuna_v1")


@pytest.mark.parametrize("name", sorted(known_sizes()))
def test_a_known_model_has_the_published_parameters(name: str) -> None:
    is_encoder = name.startswith("openai/")
    described = describe_bases(model_config("lmsys/vicuna-7b-v1.5" if is_encoder else name))
    with torch.device("meta"):
        if is_encoder:
            assert isinstance(described.vision, CLIPVisionConfig)
            network = CLIPVisionModel(described.vision)
        else:
            network = AutoModelForCausalLM.from_config(described.text)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert round(count / 1e9, 3) == known_sizes()[name]["parameters"]


def test_a_whole_model_has_those_of_the_released_one() -> None:
    with torch.device("meta"):
        model = skeleton(model_config("lmsys/vicuna-7b-v1.5"))
    rows = 2 * 64 * 4096  # the words by which the release is larger
    assert sum(parameter.numel() for parameter in model.parameters()) + rows - 4096 == LLAVA_15_7B


@pytest.mark.parametrize(
    "name", ["llava15_7b", "llava_next_vicuna_7b", "llava_next_13b", "llava_next_34b", "llava_next_llama3_8b", "tiny"]
)
def test_every_recipe_s_parts_are_known(name: str) -> None:
    described = describe_bases(load_config(shipped_config(name)).model)
    assert described.tiling.patches in (576, 36)


def test_fewer_layers_are_the_first_ones() -> None:
    with torch.device("meta"):
        model = skeleton(model_config("mistralai/Mistral-7B-Instruct-v0.2"), layers=2)
    assert len(model.language_model.base_model.layers) == 2


def test_a_model_that_is_not_at_hand_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"no configuration of '\./nowhere' is available"):
        describe_bases(model_config("./nowhere"))
