"""Models in 4 and 8 bits and models split over devices answer; what cannot work is refused in a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from anyres_vlm.checkpoints.load_save import load_pretrained
from anyres_vlm.cli.main import main
from anyres_vlm.errors import UsageError
from anyres_vlm.inference import placement
from anyres_vlm.inference.assistant import Assistant
from anyres_vlm.inference.generation import Decoding
from anyres_vlm.inference.placement import plan_devices, split
from anyres_vlm.model import quantize
from anyres_vlm.schema import Turn

# Largest difference of the first logits from fp32, whose standard deviation is about 3. Seen: 1.6 and 0.05.
LOGITS_ATOL = {"4bit": 4.0, "8bit": 0.5}


def first_logits(assistant: Assistant) -> Tensor:
    seen: list[Tensor] = []
    picture = Image.linear_gradient("L").convert("RGB")
    turns = [Turn("user", "<image>a")]
    list(assistant.stream(turns, [picture], Decoding(3), lambda _, logits: seen.append(logits)))
    return torch.cat(seen)[0]


@pytest.mark.parametrize("load", ["4bit", "8bit"])
def test_quantised_layers_answer_nearly_as_before(checkpoint: Path, load: Any) -> None:
    whole, packed = Assistant.load(checkpoint), Assistant.load(checkpoint, load=load)
    layers = {type(module).__name__ for module in packed.model.language_model.modules()}
    assert {"4bit": "Nf4Linear", "8bit": "Linear8bitLt"}[load] in layers
    plain = [name for name, module in packed.model.named_modules() if type(module) is nn.Linear]
    assert "language_model.lm_head" in plain
    assert not any(name.startswith("language_model.model") for name in plain)
    difference = float((first_logits(packed) - first_logits(whole)).abs().max())
    assert 0 < difference < LOGITS_ATOL[load], difference


def test_chat_in_4_bits(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "a.png")
    words = ["chat", str(checkpoint), "--image", str(tmp_path / "a.png"), "--prompt", "a", "--max-new-tokens", "3"]
    assert main([*words, "--load", "4bit", "--json"]) == 0
    assert '"new_tokens"' in capsys.readouterr().out


def test_what_cannot_be_loaded_is_refused(checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    words = ["chat", str(checkpoint), "--prompt", "a"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*words, "--devices", "auto"]) == 2
    assert "start it without torchrun" in capsys.readouterr().err
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    assert main([*words, "--load", "8bit"]) == 2
    assert "--load 8bit needs bitsandbytes: pip install 'anyres-vlm[quantize]'" in capsys.readouterr().err


def test_layers_are_planned_by_free_memory(checkpoint: Path, monkeypatch) -> None:
    monkeypatch.setattr("accelerate.utils.modeling.get_max_memory", lambda memory: memory)  # there are no such GPUs
    model, _ = load_pretrained(checkpoint)
    layer = sum(parameter.nbytes for parameter in model.language_model.model.layers[0].parameters())
    first = sum(parameter.nbytes for parameter in model.parameters()) - 2 * layer
    found = plan_devices(model, {0: int((first + 1.2 * layer) / (1 - placement.KEPT_FREE)), 1: 3 * layer}, None)
    cpu = torch.device("cpu")
    places = [placement._find(found, name, "", cpu) for name in ("embed_tokens", "layers.0", "layers.1", "norm")]
    assert places == [0, 1, 1, 1], "accelerate keeps room for a layer on the first"
    words = r"does not fit the 0 GB that 2 GPUs have free: use --load 8bit or 4bit, or more or larger GPUs"
    with pytest.raises(UsageError, match=words):
        plan_devices(model, {0: int((first + 1.2 * layer) / (1 - placement.KEPT_FREE)), 1: layer}, None)
    plan_devices(model, {0: int((first + 1.2 * layer) / (1 - placement.KEPT_FREE)), 1: layer}, "4bit")


def test_a_split_decoder_gives_the_same_logits(checkpoint: Path, tmp_path: Path) -> None:
    """Without a second device, a layer lies on disk: the hooks around it are the same."""
    expected = first_logits(Assistant.load(checkpoint))
    assistant = Assistant.load(checkpoint)
    decoder = assistant.model.language_model.base_model
    parts = {name: "cpu" for name, _ in decoder.named_children() if name != "layers"}
    split(assistant.model, parts | {"layers.0": "cpu", "layers.1": "disk"}, torch.device("cpu"), str(tmp_path))
    assert next(decoder.layers[1].parameters()).is_meta
    assert torch.equal(first_logits(assistant), expected)


def test_quantised_layers_go_to_the_device_of_their_part() -> None:
    device_map: placement.DeviceMap = {"embed_tokens": 0, "layers.1": 0, "layers.10": 1}
    found = [placement._find(device_map, f"model.layers.{n}.mlp", "model.", torch.device("cpu")) for n in (1, 10, 2)]
    assert found == [0, 1, torch.device("cpu")]
