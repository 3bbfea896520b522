"""Fit a recipe to given devices with as few changes as possible, for `anyres init`."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from anyres_vlm.checkpoints.describe import describe_bases
from anyres_vlm.config import STAGES, LoraSettings, RunConfig, StageConfig, StageName
from anyres_vlm.errors import UsageError
from anyres_vlm.preflight.estimate.choice import Machines
from anyres_vlm.preflight.estimate.memory import StageMemory, read_sharding
from anyres_vlm.preflight.estimate.workload import ASSUMED, GB, StageSamples, assumed_samples

CAPACITIES = (16_384, 8_192)  # tokens of a pack, tried in this order; then the longest sample that a stage accepts
LORA_RATE = 2e-4  # LLaVA's
CROWDED = 1.5  # largest accepted ratio of the samples of a step to the batch size, if packs must divide by the ranks


def variants(stage: StageName, settings: StageConfig) -> Iterator[StageConfig]:
    """Yield forms of a stage, from the recipe's own to the one that needs the least memory."""
    yield settings
    if stage == "stage1":
        return
    if settings.vision_lr is not None:
        settings = settings.model_copy(update={"vision_lr": None})
        yield settings
    for rank in (128, 64):
        yield settings.model_copy(update={"lora": LoraSettings(rank=rank, learning_rate=LORA_RATE)})
    quantized = LoraSettings(rank=64, learning_rate=LORA_RATE, quantize="nf4")
    yield settings.model_copy(update={"lora": quantized})


class Fitter:
    """Fits the stages of a recipe to devices; the memory of each form is traced only once."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self._memory: dict[tuple[StageName, int], StageMemory] = {}

    def fit(self, machines: Machines, stages: Collection[StageName] = STAGES) -> RunConfig:
        """Return the recipe with the first form of each stage that fits. Raises `UsageError` if none does."""
        return self.config.model_copy(update={stage: self.fit_stage(stage, machines) for stage in stages})

    def fit_stage(self, stage: StageName, machines: Machines) -> StageConfig:
        """Return the first form of a stage that fits, with its capacity, preset and packs per step.

        Offloading to the host is not considered, because it slows steps down several times. Raises `UsageError` if no
        form fits.
        """
        lowest = float("inf")
        for number, settings in enumerate(variants(stage, self.config.stage(stage))):
            memory = self._stage_memory(stage, number, settings).on_ranks(machines.gpus)
            presets = (None,) if machines.gpus == 1 or settings.is_quantized else ("zero2", "zero3")
            for capacity, packs in capacities(memory.samples, settings, machines.gpus):
                for preset in presets:
                    peak = _peak(memory, preset, capacity, machines.usable)
                    if peak <= machines.usable:
                        fitted = {"capacity": capacity, "packs_per_step": packs, "deepspeed": preset}
                        return settings.model_copy(update=fitted)
                    lowest = min(lowest, peak)
        raise UsageError(
            f"{stage} does not fit on {machines.gpus} x {machines.device.memory / GB:g} GB: it needs {lowest / GB:.1f} "
            f"GB per GPU or more and {machines.usable / GB:.1f} GB are usable; choose a smaller model, larger GPUs or "
            "more of them"
        )

    def _stage_memory(self, stage: StageName, number: int, settings: StageConfig) -> StageMemory:
        if (stage, number) not in self._memory:
            settings = settings.model_copy(update={"capacity": CAPACITIES[0]})
            config = self.config.model_copy(update={stage: settings})
            samples = assumed_samples(ASSUMED[stage], describe_bases(config.model).tiling)
            self._memory[stage, number] = StageMemory(config, stage, samples, ranks=1, largest=CAPACITIES[0])
        return self._memory[stage, number]


def capacities(samples: StageSamples, settings: StageConfig, ranks: int) -> Iterator[tuple[int, int | None]]:
    """Yield the capacities to try, from large to small, each with its packs per step: None for one rank.

    Packs are a multiple of the ranks, so that no rank idles, as close as possible to the batch size. Capacities with
    which one pack per rank is much more than the batch are left out, except the smallest.
    """
    tokens = settings.batch_size * float(samples.tokens.mean())
    smallest = settings.max_length
    for capacity in (*(size for size in CAPACITIES if size > smallest), smallest):
        if capacity == smallest or ranks * capacity <= CROWDED * tokens:
            yield capacity, None if ranks == 1 else ranks * max(1, round(tokens / (capacity * ranks)))


def _peak(memory: StageMemory, preset: str | None, capacity: int, usable: float) -> float:
    """Return the peak in bytes; without packs, which is less but needs no trace, if that is too much already."""
    sharding = read_sharding(preset, memory.model.language_model.config.hidden_size)
    least = memory.without_packs(sharding).peak
    recomputes = bool(memory.config.stage(memory.stage).activation_checkpointing)
    return least if least > usable else memory.at(sharding, recomputes, capacity).peak
