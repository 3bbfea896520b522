"""`anyres web`: use a checkpoint in the browser."""

from __future__ import annotations

from importlib.util import find_spec

import typer

from anyres_vlm.cli.options import DEVICES, LOAD, MODEL, TEMPLATE, Devices, Load, load_assistant
from anyres_vlm.errors import UsageError


def web(
    model: str = MODEL,
    host: str = typer.Option("127.0.0.1", help="Address to listen on; 0.0.0.0 admits all machines without a password."),
    port: int = typer.Option(7860, min=1, max=65535, help="Port to listen on."),
    max_upload_mb: int = typer.Option(20, "--max-upload-mb", min=1, help="Largest image file, in MB."),
    template: str | None = TEMPLATE,
    load: Load | None = LOAD,
    devices: Devices | None = DEVICES,
) -> None:
    """Show tiles of images, chat about them and compare grids in the browser. All data stays on this machine.

    Example: anyres web runs/tiny/stage2/model --port 8000
    """
    if find_spec("gradio") is None:
        raise UsageError("the web page needs gradio: pip install 'anyres-vlm[web]', or use anyres chat")
    # Start-up time: torch, transformers and gradio take seconds to import.
    from anyres_vlm.serve.web import WebPage, serve_page

    serve_page(WebPage(load_assistant(model, template, load, devices), model), host, port, max_upload_mb)
