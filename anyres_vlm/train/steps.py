"""The optimizer steps of a stage: the plans of its epochs, one behind the other."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import CLIPVisionConfig

from anyres_vlm.config import RunConfig, StageName
from anyres_vlm.data.index.table import Index
from anyres_vlm.data.loader import Pack
from anyres_vlm.data.packing.cost import CostModel
from anyres_vlm.data.packing.plan import Plan, plan_epoch
from anyres_vlm.data.packing.report import measure
from anyres_vlm.errors import UsageError
from anyres_vlm.flops import Flops, forward_flops
from anyres_vlm.model.encoder import ClipEncoder
from anyres_vlm.model.vlm import VisionLanguageModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageSteps:
    """All steps of a stage. `positions` are the good samples' in the index, which the plans number from 0."""

    positions: NDArray[np.int64]
    epochs: tuple[Plan, ...]
    max_steps: int | None

    @classmethod
    def plan(
        cls, index: Index, config: RunConfig, stage: StageName, cost: CostModel, max_steps: int | None
    ) -> StageSteps:
        """Plan every epoch. Raises `UsageError` for a sample above the capacity."""
        settings, positions = config.stage(stage), np.flatnonzero(index.ok)
        epochs = tuple(
            plan_epoch(
                index.tokens[positions],
                index.tiles[positions],
                capacity=settings.capacity,
                batch_size=settings.batch_size,
                packs_per_step=settings.packs_per_step,
                seed=config.seed,
                epoch=epoch,
                cost=cost,
            )
            for epoch in range(settings.epochs)
        )
        return cls(positions, epochs, max_steps)

    def __len__(self) -> int:
        steps = sum(plan.num_steps for plan in self.epochs)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def describe(self, world_size: int) -> tuple[str, tuple[str, ...]]:
        """What the first epoch's plan is worth on so many ranks, in a line, and advice where it could be worth more."""
        report = measure(self.epochs[0], world_size)
        line = (
            f"{report.packs_per_step} packs a step of up to {report.capacity:,} tokens, {report.efficiency:.1%} full; "
            f"{report.samples_per_step_mean:.1f} samples a step for a batch size of {report.batch_size}; "
            f"straggler factor {report.straggler:.3f} on {world_size} rank{'s' * (world_size > 1)}"
        )
        return line, report.advice

    @property
    def key(self) -> str:
        """What the sequence of steps follows from; with a step's number it is the state to resume from."""
        return self.epochs[0].key

    def shares(self, first_step: int, rank: int, world_size: int) -> list[list[Pack]]:
        """The packs of one rank for each step from `first_step` on, one a micro-step."""
        every = [(epoch, plan, step) for epoch, plan in enumerate(self.epochs) for step in range(plan.num_steps)]
        return [
            [Pack(epoch, self.positions[rows]) for rows in plan.shares(step, world_size)[rank]]
            for epoch, plan, step in every[first_step : len(self)]
        ]


def model_flops(model: VisionLanguageModel) -> Flops | None:
    """FLOPs of this model's parts; None for a language model that is not like Llama."""
    tower = model.vision_tower
    if isinstance(tower, ClipEncoder):
        vision = tower.vision_model.config
    else:  # a plain vision transformer, so CLIP's configuration has the words for it
        width = tower.width // len(tower.layers)
        vision = CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            image_size=tower.tile,
            patch_size=tower.patch,
        )
    try:
        return forward_flops(model.language_model.config, vision, tower.layers)
    except UsageError as error:
        logger.info("packs are balanced by the costs of a 7B model: %s", error)
        return None
