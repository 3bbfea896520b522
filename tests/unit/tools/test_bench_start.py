"""What is started every day starts at once: nothing heavy is imported, and the figures are of real processes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import start
from PIL import Image

HEAVY = (
    "torch transformers numpy pandas pyarrow numba cv2 accelerate deepspeed timm matplotlib rich huggingface_hub yaml"
)


@pytest.mark.parametrize("command", ["anyres --help", "tools/count_tokens.py IMAGE"])
def test_start_up_imports_nothing_heavy(tmp_path: Path, command: str) -> None:
    image = tmp_path / "image.jpg"
    Image.new("RGB", (64, 48)).save(image)
    (python, *words), limit = start.commands(image)[command]
    done = subprocess.run(
        [python, "-X", "importtime", *words], capture_output=True, text=True, cwd=start.ROOT, check=True
    )
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert ("typer" in loaded) == (command == "anyres --help")
    assert not loaded & set(HEAVY.split())
    assert limit is not None


def test_start_up_figures_are_of_real_processes(tmp_path: Path) -> None:
    image = tmp_path / "image.jpg"
    Image.new("RGB", (64, 48)).save(image)
    figures = start.run(1, image)["commands"]
    least = figures["python -c pass"]["cpu_s"]
    assert least is not None
    for row in figures.values():
        assert row["cpu_s"] is not None
        assert row["cpu_s"] >= least > 0
    image.unlink()
    with pytest.raises(subprocess.CalledProcessError):
        start.run(1, image)
