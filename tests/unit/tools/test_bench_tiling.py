"""The tiling benchmark runs on any photographs and says what it measured."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import cv2
import data_tiling
import numpy as np
import pytest
import torch
from PIL import Image

from anyres_vlm.errors import UsageError
from anyres_vlm.geometry import Size


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(5).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((160, 120), Image.Resampling.BICUBIC).save(tmp_path / "a.png")
    Image.fromarray(pixels).resize((900, 700), Image.Resampling.BICUBIC).save(tmp_path / "b.jpg")
    return tmp_path


@pytest.fixture
def _threads():
    before = torch.get_num_threads(), cv2.getNumThreads()
    yield
    torch.set_num_threads(before[0])
    cv2.setNumThreads(before[1])


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    data_tiling.add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.mark.usefixtures("_threads")
def test_ratios_and_pixels(photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = (Size(height=480, width=640), Size(height=1500, width=1001))
    monkeypatch.setattr(data_tiling, "SIZES", sizes)
    result = data_tiling.run(parsed("--photos", str(photos), "--rounds", "5", "--pictures", "1"))
    assert [(row["height"], row["width"]) for row in result["sizes"]] == [(480, 640), (1500, 1001)]
    for name, total in result["mix"]["ms"].items():
        assert total == pytest.approx(sum(row["ms"][name] for row in result["sizes"]))
    ms, ratio = result["mix"]["ms"], result["mix"]["ratio"]
    assert ratio["fast_torchvision"] == min(ms["torchvision"], ms["torchvision_pillow"]) / ms["fast"]
    assert ratio["fast_pil"] > 1 < ratio["exact_torchvision"]
    assert [len(rounds) for rounds in result["ratios"].values()] == [5] * 4
    assert statistics.median(result["ratios"]["fast to PIL"]) == pytest.approx(ratio["fast_pil"], rel=0.3)
    assert result["pixels"]["exact to torchvision"]["max"] == 0
    assert 0 < result["pixels"]["fast to torchvision"]["mean"] < 1
    data_tiling.show(result)
    assert "1001 x 1500" in capsys.readouterr().out


def test_what_it_needs(photos: Path) -> None:
    with pytest.raises(UsageError, match="--rounds must be at least 5"):
        data_tiling.run(parsed("--photos", str(photos), "--rounds", "4"))
    with pytest.raises(UsageError, match=r"--photos .*none: no such folder"):
        data_tiling.run(parsed("--photos", str(photos / "none")))
    for path in photos.iterdir():
        path.unlink()
    with pytest.raises(UsageError, match="no photographs: pip install scikit-image"):
        data_tiling.run(parsed("--photos", str(photos)))
