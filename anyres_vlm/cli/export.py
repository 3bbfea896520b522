"""`anyres export`: write a model as a folder for stock transformers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import typer

from anyres_vlm.cli.options import MODEL, TEMPLATE
from anyres_vlm.errors import UsageError

logger = logging.getLogger(__name__)


def export(
    model: str = MODEL,
    out: Path = typer.Argument(..., metavar="OUT", help="Folder to write; must not exist."),
    dtype: Literal["bf16", "fp16", "fp32"] | None = typer.Option(
        None, help="Dtype of the weights; default: unchanged."
    ),
    template: str | None = TEMPLATE,
) -> None:
    """Write a LlavaNextForConditionalGeneration folder, or report why stock transformers cannot express the model.

    Example: anyres export runs/tiny/stage2/model runs/export --dtype bf16
    """
    # Start-up time: torch and transformers take seconds to import.
    import torch

    from anyres_vlm.checkpoints.card import carry_card
    from anyres_vlm.checkpoints.folders import checkpoint_folder
    from anyres_vlm.checkpoints.load_save import load_pretrained, save_pretrained
    from anyres_vlm.checkpoints.stock import count_changes, stock_obstacle
    from anyres_vlm.config import template_name
    from anyres_vlm.data.chat_template import chat_jinja
    from anyres_vlm.train.checkpoint import write_folder

    if out.exists():
        raise UsageError(f"{out} exists: choose another folder")
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    folder = checkpoint_folder(model)
    loaded, tokenizer = load_pretrained(folder, template_name(template), dtypes[dtype] if dtype else None)
    if reason := stock_obstacle(loaded):
        raise UsageError(f"{model} cannot be exported: {reason}; `anyres chat` and `anyres eval` can use it unchanged")
    if changes := count_changes(loaded.tiling):
        logger.warning("%s", changes)
    jinja = chat_jinja(loaded.config.template, tokenizer)

    def fill(target: Path) -> None:
        save_pretrained(loaded, loaded.state_dict(), tokenizer, jinja, target)
        carry_card(folder, target, loaded)

    write_folder(out, fill)
    print(out)
