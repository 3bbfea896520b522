"""What is read from JSON files alone is what the configuration classes of transformers make of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, CLIPVisionConfig

from anyres_vlm.checkpoints.describe import describe, encoder_geometry
from anyres_vlm.config import EncoderConfig
from anyres_vlm.errors import DataError

SIZES = {"image_size": 84, "patch_size": 7}


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "clip_vision_model", **SIZES},
        {"model_type": "clip_vision_model"},  # the sizes are defaults
        {"model_type": "clip_vision_model", "image_size": 448},
        {"model_type": "clip", "vision_config": {"model_type": "clip_vision_model", **SIZES}},
        {"model_type": "clip", "vision_config": SIZES},
        {"model_type": "clip", "image_size": 32, "text_config": {}},
    ],
)
def test_the_geometry_of_an_encoder(tmp_path: Path, settings: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(settings))
    expected: Any = CLIPVisionConfig.from_pretrained(tmp_path)
    assert encoder_geometry(EncoderConfig(name=str(tmp_path))) == (expected.image_size, expected.patch_size)


def test_an_encoder_without_readable_configuration(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"encoder .*nowhere' cannot be loaded"):
        encoder_geometry(EncoderConfig(name=str(tmp_path / "nowhere")))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config\.json: not readable JSON"):
        encoder_geometry(EncoderConfig(name=str(tmp_path)))


@pytest.mark.parametrize("dropped", [[], ["image_size"], ["image_size", "patch_size"]])
def test_a_saved_checkpoint(tmp_path: Path, checkpoint: Path, dropped: list[str]) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    settings = json.loads((folder / "config.json").read_text())
    settings["vision_config"] = {key: v for key, v in settings["vision_config"].items() if key not in dropped}
    (folder / "config.json").write_text(json.dumps(settings))
    extras = json.loads((folder / "anyres.json").read_text())
    extras["model"] |= {"pinpoints": [[448, 448]]}  # both 28 and the default of 224 divide it
    (folder / "anyres.json").write_text(json.dumps(extras))
    expected: Any = AutoConfig.from_pretrained(folder)
    described = describe(folder)
    assert (described.tiling.tile, described.tiling.patch) == (
        expected.vision_config.image_size,
        expected.vision_config.patch_size,
    )
    assert described.vocab_size == expected.text_config.vocab_size
    assert described.vision_config is not None
    assert described.vision_config.to_dict() == expected.vision_config.to_dict()
    ours, theirs = described.text_config.to_dict(), expected.text_config.to_dict()
    assert ours == theirs | {"tie_word_embeddings": settings["tie_word_embeddings"]}
