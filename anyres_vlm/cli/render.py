"""`anyres render`: render images with captions, conversations or held-out questions."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import typer


def render(
    out: Path = typer.Argument(..., help="Folder for data.json and images/."),
    purpose: Literal["captions", "instructions", "generated", "academic", "heldout"] = typer.Option(
        "heldout", help="Kind of records; generated and academic are the two halves of instructions."
    ),
    count: int = typer.Option(330, min=1, help="Number of records."),
    seed: int = typer.Option(0, min=0, help="Seed of the images."),
) -> None:
    """Render images with captions or questions as LLaVA JSON.

    Example: anyres render runs/heldout --purpose heldout --count 330
    """
    from anyres_vlm.synthetic.dataset import write_dataset

    print(write_dataset(out, purpose, count, seed))
