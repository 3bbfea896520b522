"""`anyres init`: a commented configuration and mixture for the user's own data."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from anyres_vlm.config import RunConfig, load_config, shipped_config
from anyres_vlm.data.sources import open_source
from anyres_vlm.data.sources.json import JsonSource
from anyres_vlm.data.sources.open import MIXTURE_SUFFIXES, Peek, peek
from anyres_vlm.data.sources.parquet import ParquetSource
from anyres_vlm.data.sources.webdataset import WebDatasetSource
from anyres_vlm.errors import DataError, UsageError, did_you_mean

TINY = "tiny"
# short name -> shipped configuration
MODELS = {
    TINY: "tiny",
    "vicuna-7b": "llava_next_vicuna_7b",
    "mistral-7b": "llava_next_mistral_7b",
    "llama3-8b": "llava_next_llama3_8b",
    "vicuna-13b": "llava_next_13b",
    "yi-34b": "llava_next_34b",
}
CHECKPOINT_RECIPE = "llava_next_mistral_7b"  # a checkpoint brings its own model: only the recipe is taken
CAPACITIES = {80.0: 16_384, 40.0: 8_192, 0.0: 4_096}  # GB of a device -> tokens of a pack
LEAST_STEPS = 50  # an epoch should have, which a recipe's batch of 256 gives only to 12,800 samples
LEAST_BATCH = 8
MAX_LENGTH = 4_096


@dataclass(frozen=True)
class Answers:
    """What `anyres init` asks beside the data; `gpus` 0 is the CPU."""

    model: str
    grid: str
    gpus: int
    memory_gb: float

    @property
    def checkpoint(self) -> str | None:
        """The checkpoint to start from, where the model is no short name."""
        return None if self.model in MODELS else self.model

    def recipe(self) -> RunConfig:
        """The shipped configuration whose rates and batches hold. Raises `UsageError` for a model that is none."""
        from anyres_vlm.checkpoints.folders import HUB_ID

        if (name := MODELS.get(self.model)) is not None:
            return load_config(shipped_config(name))
        if not Path(self.model).expanduser().is_dir() and not HUB_ID.fullmatch(self.model):
            raise UsageError(
                f"--model {self.model}: expected one of {', '.join(MODELS)}, the folder of a LlavaNext checkpoint or a "
                f"hub id{did_you_mean(self.model, list(MODELS))}"
            )
        return load_config(shipped_config(CHECKPOINT_RECIPE))

    @property
    def capacity(self) -> int:
        """Tokens of a pack."""
        if self.model == TINY or self.gpus == 0:
            return MAX_LENGTH
        return next(tokens for gigabytes, tokens in CAPACITIES.items() if self.memory_gb >= gigabytes)


def fitting_batch(recipe_s: int, samples: int) -> int:
    """Samples an optimizer step: the recipe's, or fewer where an epoch would end after a few steps."""
    return min(recipe_s, max(LEAST_BATCH, samples // LEAST_STEPS))


KINDS = {JsonSource: "LLaVA JSON", ParquetSource: "Parquet", WebDatasetSource: "WebDataset tar"}
CONFIG, MIXTURE = "config.yaml", "mixture.yaml"


@dataclass(frozen=True)
class Found:
    """One source of the data: where it is, of what kind, how large, and what some of its records are like."""

    path: Path
    images: Path | None
    kind: str
    records: int
    peek: Peek


def look_at(path: Path, images: Path | None) -> Found:
    """Open a source and read some records. Raises `DataError` if it is none or empty, or none with an image is good."""
    if path.suffix.lower() in MIXTURE_SUFFIXES:
        raise UsageError(f"--data {path}: a mixture already: name it under data.path, or give the sources in it")
    source = open_source(path, images)
    found = Found(path, images, KINDS[type(source)], len(source), peek(source))
    looked, bad = found.peek.looked, found.peek.bad
    if looked == 0:
        raise DataError(f"{path}: contains no records")
    if bad and len(bad) >= found.peek.with_images:
        raise DataError(f"{path}: {len(bad)} of {looked} records looked at cannot be used: {bad[0]}; see --images")
    return found


def require_free(folder: Path) -> None:
    """Raise `UsageError` for a folder that has one of the files already."""
    for path in (folder / CONFIG, folder / MIXTURE):
        if path.exists():
            raise UsageError(f"{path} exists and is not overwritten: choose another folder, or remove it")


def write_files(answers: Answers, sources: list[Found], folder: Path) -> Path:
    """Write both files into a folder that has none of them. Returns the configuration's path.

    Raises `UsageError` where one of them exists.
    """
    config, mixture = folder / CONFIG, folder / MIXTURE
    require_free(folder)
    words = _words(answers, sources, config, mixture)
    folder.mkdir(parents=True, exist_ok=True)
    mixture.write_text(_fill("mixture.yaml.j2", words), encoding="utf-8")
    config.write_text(_fill("config.yaml.j2", words), encoding="utf-8")
    load_config(config)
    return config


def train_command(answers: Answers, config: Path) -> str:
    """How the run is started."""
    launcher = f"torchrun --nproc-per-node {answers.gpus} -m anyres_vlm" if answers.gpus > 1 else "anyres"
    stage = " --stage 2" if answers.checkpoint else ""  # its projector is trained
    return f"{launcher} train --config {config}{stage} --output {config.parent / 'run'}"


def _words(answers: Answers, sources: list[Found], config: Path, mixture: Path) -> dict[str, Any]:
    recipe, records = answers.recipe(), sum(source.records for source in sources)
    adapters = answers.gpus <= 1 and answers.model != TINY
    cpus = os.cpu_count() or 1
    return {
        "title": answers.checkpoint or answers.model,
        "records": records,
        "config_file": config,
        "mixture_file": mixture,
        "mixture_path": str(mixture.resolve()),
        "command": train_command(answers, config),
        "hardware": f"{answers.gpus} x {answers.memory_gb:g} GB" if answers.gpus else "CPU",
        "checkpoint": answers.checkpoint,
        "template": _own_template(answers.checkpoint),
        "model": recipe.model,
        "grid": answers.grid,
        "stages": [("stage1", recipe.stage1, False), ("stage2", recipe.stage2, adapters)],
        "split": answers.gpus > 1 and answers.model != TINY,
        "batch": partial(fitting_batch, samples=records),
        "max_length": MAX_LENGTH,
        "capacity": answers.capacity,
        "precision": "bf16" if answers.gpus else "fp32",
        "workers": min(8, max(1, cpus // answers.gpus)) if answers.gpus else int(cpus > 1),
        "sources": [
            {
                "path": str(source.path.resolve()),
                "images": None if source.images is None else str(source.images.resolve()),
                "kind": source.kind,
                "records": source.records,
            }
            for source in sources
        ],
    }


def _own_template(checkpoint: str | None) -> str | None:
    """The template that a checkpoint folder is known by; None for one that is not at hand."""
    if checkpoint is None or not Path(checkpoint).expanduser().is_dir():
        return None
    from anyres_vlm.checkpoints.describe import describe

    return describe(Path(checkpoint).expanduser()).config.template


def _fill(template: str, words: Mapping[str, Any]) -> str:
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    return environment.from_string((Path(__file__).parent / template).read_text(encoding="utf-8")).render(words)
