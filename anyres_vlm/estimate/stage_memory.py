"""What a stage's ranks hold by preset, checkpointing and capacity of a pack."""

from __future__ import annotations

import math

import numpy as np
import torch

from anyres_vlm.config import RunConfig, StageName
from anyres_vlm.estimate.activations import Numbers, StepBytes, micro_step_bytes, stage_skeleton
from anyres_vlm.estimate.memory import RankMemory, count_parameters, numbers_of, rank_memory
from anyres_vlm.estimate.pack import PackSize
from anyres_vlm.estimate.samples import StageSamples
from anyres_vlm.estimate.sharding import Sharding

LARGEST = 65_536  # tokens: up to there packs are looked at
DOCUMENTS = 2  # of a pack: more hold the same bytes, and take the trace longer
DENSEST = 0.99  # of the samples, by tiles and by supervised tokens a token: packs of many samples are nearer the mean


class StageMemory:
    """Traces a few packs and answers for any capacity between the longest sample and `LARGEST`.

    Between two packs a straight line is drawn. The most of several phases that each grow in a line lies below it.
    """

    def __init__(self, config: RunConfig, stage: StageName, samples: StageSamples, ranks: int) -> None:
        self.config, self.stage, self.samples, self.ranks = config, stage, samples, ranks
        self.longest = int(samples.tokens.max())
        self.capacity = max(config.stage(stage).capacity, self.longest)
        self.sizes = sorted({self.longest, self.capacity, max(LARGEST, self.capacity)})
        self._traces: dict[tuple[Numbers, bool], list[StepBytes]] = {}
        with torch.device("meta"):
            self.model = stage_skeleton(config, stage)

    def pack(self, tokens: int) -> PackSize:
        """A full pack of the samples' kind, as rich in tiles and labels as they come."""
        lengths = self.samples.tokens
        tiles = np.quantile(self.samples.tiles / lengths, DENSEST)
        supervised = np.quantile(self.samples.supervised / lengths, DENSEST)
        return PackSize(tokens, DOCUMENTS, math.ceil(tokens * tiles), math.ceil(tokens * supervised))

    def at(self, sharding: Sharding, recomputes: bool, tokens: int) -> RankMemory:
        """On one rank, with packs of so many tokens."""
        numbers = numbers_of(sharding, self.config.precision)
        count = count_parameters(self.model.parameters(), sharding)
        return rank_memory(count, sharding, numbers, self.ranks, self._step_bytes(numbers, recomputes, tokens))

    def without_packs(self, sharding: Sharding) -> RankMemory:
        """On one rank, with no pack at all."""
        numbers = numbers_of(sharding, self.config.precision)
        count = count_parameters(self.model.parameters(), sharding)
        return rank_memory(count, sharding, numbers, self.ranks, StepBytes(0, 0, 0))

    def largest(self, sharding: Sharding, recomputes: bool, usable: float) -> int | None:
        """The most tokens a pack may have; None where not even the longest sample fits."""
        if self.without_packs(sharding).peak > usable:
            return None  # and nothing needs to be traced
        low, high = self.longest, self.sizes[-1]
        if self.at(sharding, recomputes, low).peak > usable:
            return None
        while high - low > 1:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.at(sharding, recomputes, middle).peak <= usable else (low, middle)
        return high if self.at(sharding, recomputes, high).peak <= usable else low

    def _step_bytes(self, numbers: Numbers, recomputes: bool, tokens: int) -> StepBytes:
        key = numbers, recomputes
        if key not in self._traces:
            settings = self.config.stage(self.stage).model_copy(update={"activation_checkpointing": recomputes})
            config = self.config.model_copy(update={self.stage: settings})
            self._traces[key] = micro_step_bytes(config, self.stage, [self.pack(size) for size in self.sizes], numbers)
        traces = self._traces[key]
        parts = ((trace.forward, trace.held, trace.backward) for trace in traces)
        return StepBytes(*(round(float(np.interp(tokens, self.sizes, part))) for part in zip(*parts, strict=True)))
