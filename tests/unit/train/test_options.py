"""A run goes on with the defaults under which it began, also where a later release chose others."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from anyres_vlm.config import RunConfig, load_config, shipped_config
from anyres_vlm.errors import UsageError
from anyres_vlm.train.checkpoint import require_same_settings
from anyres_vlm.train.options import CONFIG_FILE, RunOptions, as_begun, stage_settings


def begin(folder: Path, *overrides: str, forget: bool = True) -> RunConfig:
    """A run's folder, `forget` for one of a release without `image_position`."""
    config = load_config(shipped_config("tiny"), overrides)
    content = config.model_dump(mode="json")
    if forget:
        del content["stage1"]["data"]["image_position"], content["stage2"]["data"]["image_position"]
    (folder / "stage2").mkdir()
    (folder / "stage2" / CONFIG_FILE).write_text(yaml.safe_dump(content))
    return config


def resumed(folder: Path, *overrides: str) -> RunConfig:
    return as_begun(load_config(shipped_config("tiny"), overrides), RunOptions(folder, ("stage1", "stage2")))


def test_a_run_of_a_release_without_the_key_keeps_its_images_where_they_are(tmp_path: Path) -> None:
    begin(tmp_path)
    config = resumed(tmp_path)
    assert config.stage2.data.image_position == "as_is"
    assert config.stage1.data.image_position == "front", "stage 1 has not begun"
    assert "image_position" not in stage_settings(config, "stage2")["data"]
    chosen = resumed(tmp_path, "stage2.data.image_position=front")
    assert stage_settings(chosen, "stage2")["data"]["image_position"] == "front"


@pytest.mark.parametrize("position", ["front", "as_is"])
def test_a_run_of_today_is_not_touched(tmp_path: Path, position: str) -> None:
    begin(tmp_path, f"stage2.data.image_position={position}", forget=False)
    assert resumed(tmp_path).stage2.data.image_position == "front"
    options = RunOptions(tmp_path, ("stage2",), resume=False)
    config = load_config(shipped_config("tiny"))
    assert as_begun(config, options) == config


def test_alpha_is_the_one_that_the_run_began_with(tmp_path: Path) -> None:
    begin(tmp_path, "stage2.lora.rank=8", "stage2.lora.alpha=256")
    lora = resumed(tmp_path, "stage2.lora.rank=8").stage2.lora
    assert lora is not None
    assert lora.alpha == 256
    chosen = resumed(tmp_path, "stage2.lora.rank=8", "stage2.lora.alpha=16").stage2.lora
    assert chosen is not None
    assert chosen.alpha == 16


@pytest.mark.parametrize("forget", [True, False])
def test_images_left_where_they_are_are_no_change_of_the_settings(tmp_path: Path, forget: bool) -> None:
    """Neither for a run of a release without the key nor for one of today that sets it."""
    override = "stage2.data.image_position=as_is"
    begin(tmp_path, override, forget=forget)
    config = resumed(tmp_path) if forget else resumed(tmp_path, override)
    settings = stage_settings(config, "stage2")
    require_same_settings(tmp_path, "stage2", settings, settings)
    chosen = stage_settings(resumed(tmp_path, "stage2.data.image_position=front"), "stage2")
    with pytest.raises(UsageError, match="image_position: as_is, the default of older versions, before, 'front' now:"):
        require_same_settings(tmp_path, "stage2", settings, chosen)
    with pytest.raises(UsageError, match="image_position: 'front' before, as_is, the default of older versions, now:"):
        require_same_settings(tmp_path, "stage2", chosen, settings)
    rate = stage_settings(resumed(tmp_path, override, "stage2.vision_lr=1e-6"), "stage2")
    with pytest.raises(UsageError, match="vision_lr: not set before, 1e-06 now"):
        require_same_settings(tmp_path, "stage2", settings, rate)
