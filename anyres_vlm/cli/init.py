"""`anyres init`: write a configuration for the user's data after a few questions."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TypeVar

import typer

from anyres_vlm.cli.options import GRID
from anyres_vlm.errors import UsageError

Value = TypeVar("Value", str, int, float)
GPU_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # created by the drivers of NVIDIA, AMD and WSL


def init(
    folder: Path = typer.Argument(Path(), help="Folder for config.yaml and mixture.yaml; created if needed."),
    data: list[Path] = typer.Option(
        [], help="Conversations: LLaVA JSON or JSONL, Parquet, tar shards or a folder of these; may be repeated."
    ),
    images: Path | None = typer.Option(None, help="Image folder of the data; default: the data's own folder."),
    model: str | None = typer.Option(
        None, help="tiny, vicuna-7b, mistral-7b, llama3-8b, vicuna-13b, yi-34b, or a LlavaNext checkpoint."
    ),
    grid: str | None = GRID,
    gpus: int | None = typer.Option(None, min=0, help="GPUs of the run; 0 for the CPU."),
    memory_gb: float | None = typer.Option(None, "--memory-gb", min=0, help="Memory of one GPU in GB."),
    yes: bool = typer.Option(False, "--yes", "-y", help="Do not prompt: use defaults for options that are not given."),
) -> None:
    """Write a commented config and mixture for your data; prompts for options that are not given.

    Opens and counts the data, reads some records and their images, and derives the template from the model. Existing
    files are not overwritten.

    Example: anyres init runs/mine --data data.json --images images --model mistral-7b --gpus 8 --memory-gb 80
    """
    # Start-up time: reading data takes pyarrow.
    from anyres_vlm.geometry import Grid
    from anyres_vlm.preflight.init import MODELS, TINY, Answers, look_at, require_free, train_command, write_files

    def ask(given: Value | None, option: str, question: str, default: Value) -> Value:
        return given if given is not None else default if yes else _prompt(option, question, default)

    require_free(folder)
    if not data and yes:
        raise UsageError("--yes has no default for the data: give --data PATH")
    asks_images = not data and images is None
    paths = tuple(data) or (Path(_prompt("--data", "conversations (JSON, JSONL, Parquet, tar or a folder)", None)),)
    if asks_images and (answer := ask(None, "--images", "image folder (empty: the data's own)", "")):
        images = Path(answer)
    sources = [look_at(path.expanduser(), None if images is None else images.expanduser()) for path in paths]
    for source in sources:
        looked = source.peek
        print(
            f"data:   {source.path}: {source.kind}, {source.records:,} records; "
            f"{looked.looked - len(looked.bad)} of {looked.looked} inspected ones are usable, "
            f"{looked.with_images} have images"
        )
    present, memory = (0, 80.0) if gpus is not None and memory_gb is not None else _find_gpus()
    count = ask(gpus, "--gpus", "GPUs (0 for the CPU)", present)
    answers = Answers(
        model=ask(model, "--model", f"model ({', '.join(MODELS)} or a checkpoint)", "mistral-7b" if count else TINY),
        grid=str(Grid.parse(ask(grid, "--grid", "largest grid of tiles", "2x2"))),
        gpus=count,
        memory_gb=ask(memory_gb, "--memory-gb", "memory of one GPU in GB", round(memory)) if count else 0.0,
    )
    config = write_files(answers, sources, folder)
    print(f"wrote:  {config}, {config.with_name('mixture.yaml')}")
    print(f"check:  anyres doctor --config {config} --output {config.parent / 'run'}")
    print(f"next:   anyres rehearse --config {config} --output {config.parent / 'run'}")
    print(f"train:  {train_command(answers, config)}")


def _find_gpus() -> tuple[int, float]:
    """Return the number of GPUs and the memory of one in GB, or 0 and 80."""
    if any(Path(file).exists() for file in GPU_FILES) or os.name == "nt":
        import torch  # start-up time: takes seconds

        if torch.cuda.is_available():
            return torch.cuda.device_count(), torch.cuda.get_device_properties(0).total_memory / 1e9
    return 0, 80.0


def _prompt(option: str, question: str, default: Value | None) -> Value:
    """Prompt for a value of the default's type. Raises `UsageError` at the end of the input."""
    try:
        answer: Value = typer.prompt(question, default=default, show_default=default != "", err=True)
    except typer.Abort:
        if sys.stdin.isatty():
            raise
        raise UsageError(f"no answer to {option}: give it, or --yes for the defaults") from None
    return answer
