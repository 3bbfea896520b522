"""`anyres import`: convert a checkpoint from the original LLaVA-NeXT layout."""

from __future__ import annotations

from pathlib import Path

import typer

from anyres_vlm.cli.options import TEMPLATE
from anyres_vlm.errors import UsageError


def import_checkpoint(
    source: str = typer.Argument(..., metavar="SRC", help="Folder or hub id in the original layout."),
    out: Path = typer.Argument(..., metavar="OUT", help="Folder to write; must not exist."),
    template: str | None = TEMPLATE,
    encoder: str | None = typer.Option(None, help="Folder or hub id of the CLIP encoder; default: as in SRC."),
) -> None:
    """Convert a checkpoint in the layout of LLaVA-NeXT's authors; its pinpoints keep their meaning (dialect llava).

    Example: anyres import liuhaotian/llava-v1.6-vicuna-7b runs/vicuna --template vicuna_v1
    """
    # Start-up time: torch and transformers take seconds to import.
    from anyres_vlm.checkpoints.card import write_card
    from anyres_vlm.checkpoints.load_save import end_tokens, save_pretrained
    from anyres_vlm.checkpoints.original import load_original
    from anyres_vlm.config import template_name
    from anyres_vlm.data.chat_template import chat_jinja
    from anyres_vlm.data.conversation import ConversationTokenizer
    from anyres_vlm.train.checkpoint import write_folder

    if out.exists():
        raise UsageError(f"{out} exists: choose another folder")
    model, tokenizer = load_original(source, template_name(template), encoder)
    generation = model.language_model.generation_config
    stops = ConversationTokenizer(model.config.template, tokenizer).stop_ids
    generation.eos_token_id = sorted({*stops, *end_tokens(generation)})
    jinja = chat_jinja(model.config.template, tokenizer)

    def fill(folder: Path) -> None:
        save_pretrained(model, model.state_dict(), tokenizer, jinja, folder)
        write_card(folder, model, [f"Imported by `anyres import` from the original layout of `{source}`."])

    write_folder(out, fill)
    print(out)
