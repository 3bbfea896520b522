"""The base models that can be chosen by a short name, and what a choice means for a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from anyres_vlm.config import RunConfig, load_config, shipped_config
from anyres_vlm.errors import UsageError
from anyres_vlm.explain import did_you_mean

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
        from anyres_vlm.model.files import HUB_ID  # start-up time

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
