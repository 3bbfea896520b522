"""Options that several commands share, and the checkpoint that they load."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal

import typer

from anyres_vlm.errors import UsageError

if TYPE_CHECKING:
    from anyres_vlm.inference.assistant import Assistant

CONFIG: Any = typer.Option(None, help="YAML file; default: the embedded default, configs/tiny.yaml.")
SETTINGS: Any = typer.Option([], "--set", metavar="KEY=VALUE", help="Override a key of the config.")
GRID_HELP = "Largest grid of tiles, ROWSxCOLUMNS; 1x1 is only the thumbnail."
GRID: Any = typer.Option(None, help=GRID_HELP)
LAYOUT: Any = typer.Option(None, help="spatial_unpad drops the features of padding, flat keeps all tiles.")
DIALECT: Any = typer.Option(None, help="hf counts as transformers does, llava as the original code does.")
MODEL: Any = typer.Argument(..., help="Checkpoint folder (anyres_vlm or LlavaNext) or hub id.")
TEMPLATE: Any = typer.Option(
    None, help="Chat template that the checkpoint was trained with: vicuna_v1, mistral, ... Default: its own."
)
LOAD: Any = typer.Option(
    None, help="Hold the language model's layers in 4 bits (NF4) or 8 bits; needs the extra quantize. Default: bf16."
)
DEVICES: Any = typer.Option(
    None, help="auto: split the language model's layers over all GPUs, for models larger than one. Default: one GPU."
)
Load = Literal["4bit", "8bit"]
Devices = Literal["auto"]


def load_assistant(model: str, template: str | None, load: Load | None, devices: Devices | None) -> Assistant:
    """Load the checkpoint that a command was given, as these options say.

    Raises `UsageError` for options that cannot be used, and without bitsandbytes where it is needed.
    """
    # Start-up time: torch and transformers take seconds to import.
    from anyres_vlm.config import template_name
    from anyres_vlm.inference.assistant import Assistant
    from anyres_vlm.model.quantize import require_bitsandbytes

    if devices == "auto" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("--devices auto uses all GPUs in one process: start it without torchrun, or leave it out")
    if load is not None:
        require_bitsandbytes(f"--load {load}")
    return Assistant.load(model, template_name(template), load, devices)
