"""Published runs compared with the time model: the MFU that their hours imply."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from anyres_vlm.checkpoints.bases import skeleton
from anyres_vlm.config import StageName, load_config, shipped_config
from anyres_vlm.preflight.estimate.workload import ASSUMED, Recipe, assumed_samples, find_device, stage_work
from anyres_vlm.train.recipe import trained_rates
from anyres_vlm.train.steps import model_flops


@dataclass(frozen=True)
class PublishedRun:
    """A run as reported by its authors; `hours` are per stage, or for both if only their sum is known."""

    name: str
    config: str
    changes: tuple[str, ...]
    gpus: int
    hours: dict[tuple[StageName, ...], float]
    stage2: Recipe
    source: str


_MIX = ASSUMED["stage2"]
PUBLISHED = (
    PublishedRun(
        "LLaVA-1.5-7B", "llava15_7b", (), 8, {("stage1",): 3.5, ("stage2",): 10}, _MIX, "LLaVA's README, Train"
    ),
    PublishedRun(
        "LLaVA-1.5-13B",
        "llava15_7b",
        ("model.llm=lmsys/vicuna-13b-v1.5",),
        8,
        {("stage1",): 5.5, ("stage2",): 20},
        _MIX,
        "LLaVA's README, Train",
    ),
    PublishedRun(
        "Open-LLaVA-NeXT-7B",
        "llava_next_vicuna_7b",
        (),
        16,
        {("stage1",): 5, ("stage2",): 20},
        replace(_MIX, samples=1_021_000, with_image=980_000),
        "Open-LLaVA-NeXT's README; its mix of about 1M samples",
    ),
    PublishedRun(
        "LLaVA-1.6-34B",
        "llava_next_34b",
        (),
        32,
        {("stage1", "stage2"): 24},
        replace(_MIX, samples=760_000, with_image=720_000),
        "LLaVA-NeXT's announcement, about a day; its mix of about 760K samples",
    ),
)


@dataclass(frozen=True)
class PublishedRow:
    """One reported time: published hours, predicted hours at a given MFU, and the MFU implied by published hours."""

    run: str
    gpus: int
    stages: tuple[StageName, ...]
    tokens: int
    flops: float
    published_hours: float
    predicted_hours: float
    implied_mfu: float
    assumed: Recipe  # of stage 2
    source: str


def published_rows(mfu: float) -> Iterator[PublishedRow]:
    """Yield a row for each reported time, on A100s with activation checkpointing, as these runs had."""
    a100 = find_device("a100-80gb")
    for run in PUBLISHED:
        config = load_config(shipped_config(run.config), run.changes)
        with torch.device("meta"):
            model = skeleton(config.model)
        flops = model_flops(model)
        assert flops is not None, "all shipped recipes have Llama-like models"
        recipes: dict[StageName, Recipe] = {"stage1": ASSUMED["stage1"], "stage2": run.stage2}
        samples = {stage: assumed_samples(recipe, model.tiling) for stage, recipe in recipes.items()}
        work = {
            stage: stage_work(samples[stage], flops, trained_rates(config, stage), 1, recomputes=True)
            for stage in recipes
        }
        for stages, hours in run.hours.items():
            yield PublishedRow(
                run=run.name,
                gpus=run.gpus,
                stages=stages,
                tokens=sum(int(samples[stage].tokens.sum()) for stage in stages),
                flops=sum(work[stage].useful for stage in stages),
                published_hours=hours,
                predicted_hours=sum(work[stage].hours(a100, run.gpus, mfu) for stage in stages),
                implied_mfu=sum(work[stage].implied_mfu(a100, run.gpus, hours) for stage in stages),
                assumed=run.stage2,
                source=run.source,
            )
