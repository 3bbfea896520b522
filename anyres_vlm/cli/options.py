"""Options that several commands share."""

from __future__ import annotations

from typing import Any

import typer

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
