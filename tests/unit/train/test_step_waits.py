"""An optimizer step reads values from the device as often for many packs as for one: never between packs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode

from anyres_vlm.train.engine.engine import Engine

sys.path.append(str(Path(__file__).parents[2] / "parity"))
from test_packing import IMAGE, TILE, documents, language_config, make_model

from anyres_vlm.data.loader import collate

# Operations whose result or its shape the host has to read from the device.
READS = ("_local_scalar_dense", "nonzero", "masked_select", "masked_scatter", "is_nonzero", "equal", "unique")


class Reads(TorchDispatchMode):
    """Counts the operations that would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name().partition("::")[2].startswith(READS)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An engine of one rank in bf16."""
    AcceleratorState._reset_state(True)
    yield Engine.start("bf16", rank_timeout_minutes=1)
    AcceleratorState._reset_state(True)


def test_no_value_is_read_between_packs(engine: Engine) -> None:
    """Regression: each pack read its lengths, its number of image tokens and its supervised positions."""
    model = make_model(language_config("llama"))
    model.vision_tower.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine.prepare(model, torch.optim.AdamW(trained, lr=1e-4, foreach=True), max_grad_norm=1.0)
    packs = [collate(documents(model, seed, 4, with_images=seed != 2), TILE, IMAGE) for seed in range(4)]
    engine.step(packs[:1])
    counts = []
    for step in (packs[:1], packs):
        with Reads() as reads:
            result = engine.step(step)
        assert not result.is_skipped
        counts.append(reads.count)
    assert counts[0] == counts[1]


def test_cudnn_attention_is_off(engine: Engine) -> None:
    """Regression: cuDNN plans anew for each number of keys, so for each document of a pack."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    Engine.start("bf16", rank_timeout_minutes=1)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
