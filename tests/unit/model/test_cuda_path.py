"""The pass that a GPU runs, traced on fake tensors: attention kernels are counted, and reading a value would fail.

Fake tensors have a device, a dtype and a shape, but no content, so the CUDA branches run without a GPU. Autograd needs
the device's runtime: backward passes run on fake CPU tensors, with the varlen branch forced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, Qwen3Config

from anyres_vlm.config import EncoderConfig, LoraSettings, ModelConfig
from anyres_vlm.data.loader import collate
from anyres_vlm.geometry import Size, plan_tiles
from anyres_vlm.model import attention
from anyres_vlm.model.encoder import ClipEncoder
from anyres_vlm.model.lora import add_lora
from anyres_vlm.model.quantize import Nf4Linear, quantize
from anyres_vlm.model.vlm import VisionLanguageModel
from anyres_vlm.schema import IGNORE_INDEX, Batch, Sample

LAYERS, TILE, IMAGE = 3, 28, 4
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),  # normalises queries and keys
    "dropout": LlamaConfig(**SHAPE, attention_dropout=0.1),
    "odd heads": LlamaConfig(**SHAPE | {"num_attention_heads": 16, "num_key_value_heads": 16}),  # of 4 dimensions
}
Kind = Literal["plain", "lora", "qlora", "deepspeed", "fp32"]


class Operations(TorchDispatchMode):
    """Counts the operations, by name, and the copies from the GPU to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().partition("::")[2].partition(".")[0]
        self.calls[name] += 1
        is_gpu = bool(args) and isinstance(args[0], torch.Tensor) and args[0].is_cuda
        if is_gpu and name == "_to_copy" and not out.is_cuda:
            self.calls["to host"] += 1
        return out

    @property
    def sdpa(self) -> int:
        """Calls of SDPA, which has no fused kernel for fake tensors of a GPU and computes one softmax per call."""
        return self.calls["_safe_softmax"]


def pack(model: VisionLanguageModel) -> Batch:
    """Two documents with an image, and one of words."""
    rng, loaded = np.random.default_rng(0), []
    for words, size in ((9, Size(height=50, width=90)), (5, None), (30, Size(height=28, width=28))):
        ids, plans, tiles = rng.integers(5, 100, words), (), []
        if size is not None:
            ids[2], plans = IMAGE, (plan_tiles(size, model.tiling),)
            tiles = [np.zeros((plans[0].num_tiles, 3, TILE, TILE), np.uint8)]
        labels = np.where((rng.random(words) < 0.5) & (ids != IMAGE), ids, IGNORE_INDEX)
        loaded.append((Sample("s", ids.astype(np.int32), labels.astype(np.int32), (), plans), tiles))
    return collate(loaded, TILE, IMAGE)


@contextmanager
def fake_pass(kind: Kind, device: str, family: str = "llama") -> Iterator[tuple[VisionLanguageModel, Batch]]:
    """Yield a model as the backend trains it and a pack, both fake, in the backend's autocast."""
    config = ModelConfig(llm="random", encoder=EncoderConfig(name="random"), template="vicuna_v1")
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=TILE,
        patch_size=14,
    )
    encoder = ClipEncoder(CLIPVisionModel(vision), -2, (0.5,) * 3, (0.25,) * 3)
    model = VisionLanguageModel(config, encoder, AutoModelForCausalLM.from_config(CONFIGS[family]), IMAGE)
    if kind in ("lora", "qlora"):
        model.requires_grad_(False)
        add_lora(model, LoraSettings(rank=4), seed=0)
    if kind == "qlora":
        quantize(model.language_model, "4bit", lambda _: torch.device("cpu"))
    model.vision_tower.requires_grad_(False)
    batch, mode = pack(model), FakeTensorMode()

    def fake(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        with mode:
            return torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=device)

    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                made = fake(old.detach(), torch.bfloat16 if kind == "deepspeed" else None)
                module._parameters[name] = torch.nn.Parameter(made, requires_grad=old.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else fake(buffer)
        if isinstance(module, Nf4Linear):
            for scales in (module.scales, module.scales.state2):
                scales.absmax, scales.code = fake(scales.absmax), fake(scales.code)
            module.scales.offset = fake(module.scales.offset)
    with mode, bf16_autocast(device, enabled=kind in ("plain", "lora", "qlora")):
        yield model.train(), batch._each(fake)


@contextmanager
def bf16_autocast(device: str, *, enabled: bool) -> Iterator[None]:
    """Set what `torch.autocast` sets, which refuses to for CUDA where there is none."""
    before = torch.is_autocast_enabled(device)
    torch.set_autocast_enabled(device, enabled)
    torch.set_autocast_dtype(device, torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, before)
        torch.clear_autocast_cache()


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch report a GPU of compute capability 8.0."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))


@pytest.mark.usefixtures("ampere")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("kind", ["plain", "lora", "qlora", "deepspeed"])
def test_bf16_takes_one_varlen_call_a_layer(kind: Kind, family: str) -> None:
    """Regression: autocast left queries and keys in fp32 after the rotary embedding, so SDPA ran per document."""
    with fake_pass(kind, "cuda", family) as (model, batch), Operations() as seen:
        assert model(batch).is_cuda
    assert seen.calls["_varlen_attn"] == LAYERS
    assert seen.sdpa == 2  # blocks of the encoder
    assert seen.calls["to host"] == 0


@pytest.mark.parametrize(
    ("capability", "kind", "family"),
    [
        ((7, 5), "plain", "llama"),
        ((7, 0), "deepspeed", "llama"),
        ((8, 0), "fp32", "llama"),
        ((8, 0), "plain", "dropout"),
        ((8, 0), "plain", "odd heads"),
    ],
)
def test_what_flash_attention_lacks_takes_sdpa(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], kind: Kind, family: str
) -> None:
    """Regression: GPUs below compute capability 8.0 took the kernel, which raises there."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    with fake_pass(kind, "cuda", family) as (model, batch), Operations() as seen:
        model(batch)
    assert seen.calls["_varlen_attn"] == 0
    assert seen.sdpa == 2 + LAYERS * len(batch.lengths)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["plain", "lora", "qlora", "deepspeed"])
def test_backward_of_the_varlen_branch(monkeypatch: pytest.MonkeyPatch, kind: Kind, checkpointing: bool) -> None:
    """No operation may read a value on the way: that raises here, and would wait for the GPU."""
    monkeypatch.setattr(attention, "varlen_obstacle", lambda *arguments: None)
    with fake_pass(kind, "cpu") as (model, batch):
        if checkpointing:
            model.language_model.activation_checkpointing_enable()
        with Operations() as seen:
            model(batch).backward()
    assert seen.calls["_varlen_attn"] == LAYERS * (1 + checkpointing)
    assert seen.calls["_varlen_attn_backward"] == LAYERS
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained
    for parameter in trained:
        assert parameter.grad is not None
        assert (parameter.grad.shape, parameter.grad.dtype) == (parameter.shape, parameter.dtype)
