"""`anyres render`: pictures of the embedded default with captions, conversations or held-out questions."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import typer


def render(
    out: Path = typer.Argument(..., help="Folder that receives data.json and images/."),
    purpose: Literal["captions", "instructions", "generated", "academic", "heldout"] = typer.Option(
        "heldout", help="What the records are for; generated and academic are the two halves of instructions apart."
    ),
    count: int = typer.Option(330, min=1, help="Records to write."),
    seed: int = typer.Option(0, min=0, help="Other seeds give other pictures."),
) -> None:
    """Render pictures with captions or questions as LLaVA JSON.

    Example: anyres render runs/heldout --purpose heldout --count 330
    """
    from anyres_vlm.synthetic.dataset import write_dataset

    print(write_dataset(out, purpose, count, seed))
