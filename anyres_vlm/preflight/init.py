"""Inspect the user's data and write a commented configuration and mixture for it (`anyres init`)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from anyres_vlm.config import STAGES, CheckpointConfig, ModelConfig, RunConfig, load_config, shipped_config
from anyres_vlm.data.sources import open_source
from anyres_vlm.data.sources.json import JsonSource
from anyres_vlm.data.sources.open import MIXTURE_SUFFIXES, Peek, peek
from anyres_vlm.data.sources.parquet import ParquetSource
from anyres_vlm.data.sources.webdataset import WebDatasetSource
from anyres_vlm.errors import DataError, UsageError, did_you_mean
from anyres_vlm.geometry import Grid

CONFIG, MIXTURE = "config.yaml", "mixture.yaml"
KINDS = {JsonSource: "LLaVA JSON", ParquetSource: "Parquet", WebDatasetSource: "WebDataset tar"}
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
CHECKPOINT_RECIPE = "llava_next_mistral_7b"  # for a checkpoint, whose model replaces the recipe's
MIN_STEPS = 50  # of an epoch; a recipe's batch of 256 reaches that with 12,800 samples
MIN_BATCH = 8
TILE_TOKENS, TEXT_TOKENS = 600, 1_096  # of a 336 px tile with its newlines; of a long conversation


@dataclass(frozen=True)
class Answers:
    """The user's choices besides the data; `gpus` is 0 for a run on the CPU."""

    model: str
    grid: str
    gpus: int
    memory_gb: float

    @property
    def checkpoint(self) -> str | None:
        """The checkpoint to start from, unless the model is one of the short names."""
        return None if self.model in MODELS else self.model

    def recipe(self) -> RunConfig:
        """Return the shipped configuration with the learning rates and batch sizes to use. Raises `UsageError`."""
        from anyres_vlm.checkpoints.folders import HUB_ID

        if (name := MODELS.get(self.model)) is not None:
            return load_config(shipped_config(name))
        if not Path(self.model).expanduser().is_dir() and not HUB_ID.fullmatch(self.model):
            raise UsageError(
                f"--model {self.model}: expected one of {', '.join(MODELS)}, the folder of a LlavaNext checkpoint or a "
                f"hub id{did_you_mean(self.model, list(MODELS))}"
            )
        return load_config(shipped_config(CHECKPOINT_RECIPE))

    def fitted(self, records: int) -> RunConfig:
        """Return the recipe as it fits the devices, with batches that suit the number of records.

        Raises `UsageError` if no form of it fits. A checkpoint that is not on this machine is taken for a 7B model.
        """
        config = _replace_model(self.recipe(), self.checkpoint, self.grid)
        length = max_length(Grid.parse(self.grid))
        for stage in STAGES:
            settings = config.stage(stage)
            change = {
                "batch_size": fitting_batch(settings.batch_size, records),
                "max_length": length,
                "capacity": length,
                "packs_per_step": None,
                "deepspeed": None,
            }
            config = config.model_copy(update={stage: settings.model_copy(update=change)})
        if self.model == TINY or self.gpus == 0:
            return config
        from anyres_vlm.preflight.estimate.choice import Machines  # start-up time: imports torch
        from anyres_vlm.preflight.estimate.fit import Fitter
        from anyres_vlm.preflight.estimate.workload import GB, Device

        machines = Machines(Device("GPU", self.memory_gb * GB, peak=1.0), self.gpus)
        return Fitter(config).fit(machines, STAGES if self.checkpoint is None else ("stage2",))


@dataclass(frozen=True)
class Found:
    """One source of the data, with what was found in some of its records."""

    path: Path
    images: Path | None
    kind: str
    records: int
    peek: Peek


def look_at(path: Path, images: Path | None) -> Found:
    """Open a source and read some records. Raises `DataError` if it is no source, is empty or has no usable images."""
    if path.suffix.lower() in MIXTURE_SUFFIXES:
        raise UsageError(f"--data {path}: already a mixture: set data.path to it, or give the sources that it lists")
    source = open_source(path, images)
    found = Found(path, images, KINDS[type(source)], len(source), peek(source))
    looked, bad = found.peek.looked, found.peek.bad
    if looked == 0:
        raise DataError(f"{path}: contains no records")
    if bad and len(bad) >= found.peek.with_images:
        raise DataError(f"{path}: {len(bad)} of {looked} inspected records are unusable: {bad[0]}; see --images")
    return found


def require_free(folder: Path) -> None:
    """Raise `UsageError` if the folder already has one of the files."""
    for path in (folder / CONFIG, folder / MIXTURE):
        if path.exists():
            raise UsageError(f"{path} exists and is not overwritten: choose another folder, or remove it")


def write_files(answers: Answers, sources: list[Found], folder: Path) -> Path:
    """Write both files and return the configuration's path.

    Raises `UsageError` if one of them exists.
    """
    config, mixture = folder / CONFIG, folder / MIXTURE
    require_free(folder)
    variables = _variables(answers, sources, config, mixture)
    folder.mkdir(parents=True, exist_ok=True)
    mixture.write_text(_fill("mixture.yaml.j2", variables), encoding="utf-8")
    config.write_text(_fill("config.yaml.j2", variables), encoding="utf-8")
    load_config(config)
    return config


def train_command(answers: Answers, config: Path) -> str:
    """Return the command that starts the run."""
    launcher = f"torchrun --nproc-per-node {answers.gpus} -m anyres_vlm" if answers.gpus > 1 else "anyres"
    stage = " --stage 2" if answers.checkpoint else ""  # the projector is already trained
    return f"{launcher} train --config {config}{stage} --output {config.parent / 'run'}"


def fitting_batch(recipe_size: int, samples: int) -> int:
    """Return the samples per optimizer step: the recipe's, or fewer if an epoch would have too few steps."""
    return min(recipe_size, max(MIN_BATCH, samples // MIN_STEPS))


def _variables(answers: Answers, sources: list[Found], config: Path, mixture: Path) -> dict[str, Any]:
    records, cpus = sum(source.records for source in sources), os.cpu_count() or 1
    recipe, fitted = answers.recipe(), answers.fitted(records)
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
        "stages": [(name, fitted.stage(name), recipe.stage(name)) for name in STAGES],
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


def max_length(grid: Grid) -> int:
    """Return a length that conversations about an image of the largest grid fit into, a multiple of 1,024 tokens."""
    tokens = TILE_TOKENS * (grid.rows * grid.cols + 1) + TEXT_TOKENS
    return 1024 * max(4, -(-tokens // 1024))


def _replace_model(config: RunConfig, checkpoint: str | None, grid: str) -> RunConfig:
    """Put the grid and, if its folder is on this machine, the checkpoint into a recipe."""
    model: ModelConfig | CheckpointConfig = config.model
    if checkpoint is not None and Path(checkpoint).expanduser().is_dir():
        model = CheckpointConfig(checkpoint=checkpoint, grid=grid)
    else:
        model = model.model_copy(update={"grid": grid})
    return config.model_copy(update={"model": model})


def _own_template(checkpoint: str | None) -> str | None:
    """Return the template of a checkpoint folder; None if it is not on this machine."""
    if checkpoint is None or not Path(checkpoint).expanduser().is_dir():
        return None
    from anyres_vlm.checkpoints.describe import describe

    return describe(Path(checkpoint).expanduser()).config.template


def _fill(template: str, variables: Mapping[str, Any]) -> str:
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    return environment.from_string((Path(__file__).parent / template).read_text(encoding="utf-8")).render(variables)
