"""Options that several commands share."""

from __future__ import annotations

from typing import Any

import typer

TEMPLATE: Any = typer.Option(
    None, help="Chat template that the checkpoint was trained with: vicuna_v1, mistral, ... Default: its own."
)
