"""`anyres init` proposes configurations that fit, by a second estimate of the configuration itself."""

from __future__ import annotations

from functools import cache

import pytest

from anyres_vlm.checkpoints.describe import describe_bases
from anyres_vlm.config import STAGES, RunConfig, StageName, load_config, shipped_config
from anyres_vlm.errors import UsageError
from anyres_vlm.preflight.estimate.choice import Machines
from anyres_vlm.preflight.estimate.fit import Fitter
from anyres_vlm.preflight.estimate.memory import StageMemory, read_sharding
from anyres_vlm.preflight.estimate.workload import ASSUMED, GB, Device, assumed_samples
from anyres_vlm.preflight.init import MODELS, TINY

GRID = [(memory, gpus) for memory in (24, 40, 48, 80, 141) for gpus in (1, 2, 4, 8)]
RECIPES = {name: recipe for name, recipe in MODELS.items() if name != TINY}
DOES_NOT_FIT = {"vicuna-13b": {(24, 1)}, "yi-34b": {(24, 1), (24, 2), (24, 4), (40, 1), (40, 2), (48, 1), (80, 1)}}


@cache
def fitter(recipe: str) -> Fitter:
    config = load_config(shipped_config(recipe))
    for stage in STAGES:
        change = {"packs_per_step": None}
        config = config.model_copy(update={stage: config.stage(stage).model_copy(update=change)})
    return Fitter(config)


def machines(memory_gb: int, gpus: int) -> Machines:
    return Machines(Device("GPU", memory_gb * GB, peak=1.0), gpus)


def peak(config: RunConfig, stage: StageName, gpus: int) -> float:
    settings = config.stage(stage)
    samples = assumed_samples(ASSUMED[stage], describe_bases(config.model).tiling)
    memory = StageMemory(config, stage, samples, gpus)
    sharding = read_sharding(settings.deepspeed, memory.model.language_model.config.hidden_size)
    return memory.at(sharding, settings.activation_checkpointing, settings.capacity).peak


def test_one_small_card_trains_adapters_and_eight_large_ones_the_recipe() -> None:
    vicuna = fitter(RECIPES["vicuna-7b"])
    small = vicuna.fit_stage("stage2", machines(24, 1))
    assert small.lora is not None
    assert small.lora.rank <= 64
    assert (small.vision_lr, small.deepspeed, small.packs_per_step) == (None, None, None)
    large = vicuna.fit_stage("stage2", machines(80, 8))
    assert (large.lora, large.vision_lr, large.deepspeed, large.capacity) == (None, 2e-6, "zero2", 16_384)
    assert large.packs_per_step == 16, "about 128 samples of 2,447 tokens, and a multiple of 8 ranks"


@pytest.mark.parametrize("gpus", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_the_written_configuration_fits(gpus: int) -> None:
    devices = machines(24, gpus)
    fitted = fitter(RECIPES["vicuna-7b"]).fit(devices, ("stage2",))
    assert peak(fitted, "stage2", gpus) <= devices.usable


def test_what_does_not_fit_is_an_error_that_says_what_would() -> None:
    with pytest.raises(UsageError, match=r"stage1 does not fit on 1 x 24 GB: it needs .* larger GPUs or more of them"):
        fitter(RECIPES["yi-34b"]).fit(machines(24, 1))


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_machine(name: str) -> None:
    unfit = set()
    for memory_gb, gpus in GRID:
        devices = machines(memory_gb, gpus)
        try:
            config = fitter(RECIPES[name]).fit(devices)
        except UsageError:
            unfit.add((memory_gb, gpus))
            continue
        for stage in STAGES:
            settings = config.stage(stage)
            assert peak(config, stage, gpus) <= devices.usable
            assert settings.capacity >= settings.max_length
            assert gpus == 1 or (settings.packs_per_step or 0) % gpus == 0
    assert unfit == DOES_NOT_FIT.get(name, set())
