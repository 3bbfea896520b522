"""The estimate of a whole run: for each stage what fits, what it takes and how long."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from anyres_vlm.config import RunConfig, StageName
from anyres_vlm.data.packing.cost import derive_cost
from anyres_vlm.data.packing.plan import plan_epoch
from anyres_vlm.data.packing.report import PlanReport, measure
from anyres_vlm.errors import UsageError
from anyres_vlm.estimate.choice import Way, cheapest, compare_ways
from anyres_vlm.estimate.devices import Device
from anyres_vlm.estimate.memory import Parameters, count_parameters
from anyres_vlm.estimate.samples import ASSUMED, StageSamples, assumed_samples, indexed_samples
from anyres_vlm.estimate.stage_memory import StageMemory
from anyres_vlm.estimate.time import Work, stage_work
from anyres_vlm.flops import Flops
from anyres_vlm.model.skeleton import describe_bases
from anyres_vlm.train.recipe import trained_rates
from anyres_vlm.train.steps import model_flops

STAGES: tuple[StageName, ...] = ("stage1", "stage2")


@dataclass(frozen=True)
class Machines:
    """`gpus` devices, a rank each; `headroom` is the share of a device's memory for what is not a tensor."""

    device: Device
    gpus: int
    headroom: float
    mfu: float

    @property
    def usable(self) -> float:
        """Bytes for tensors on a device."""
        return self.device.memory * (1 - self.headroom)


@dataclass(frozen=True)
class StageEstimate:
    """What a stage takes. `chosen`, `plan`, `work` and `hours` are None where nothing fits."""

    stage: StageName
    samples: StageSamples
    parameters: Parameters
    capacity: int
    longest: int
    ways: list[Way]
    chosen: Way | None
    plan: PlanReport | None
    work: Work | None
    hours: float | None

    @property
    def reason(self) -> str | None:
        """Why nothing fits: what stops the way that comes furthest."""
        if self.chosen is not None:
            return None
        # the way that holds least, among those that come as far as any
        last = min(self.ways, key=lambda way: (way.memory is None, way.least))
        return f"nothing fits; {last.name}, which holds least, does not: {last.reason}"


def estimate_run(config: RunConfig, indexes: Mapping[StageName, Path], machines: Machines) -> list[StageEstimate]:
    """Both stages. Without an index, of the command line or of the configuration, the recipe's data is assumed."""
    return [_estimate_stage(config, stage, indexes.get(stage), machines) for stage in STAGES]


def _estimate_stage(config: RunConfig, stage: StageName, index: Path | None, machines: Machines) -> StageEstimate:
    settings = config.stage(stage)
    index = index or (settings.data.index if settings.data.index and settings.data.index.exists() else None)
    samples = indexed_samples(index) if index else assumed_samples(ASSUMED[stage], describe_bases(config.model).tiling)
    memory = StageMemory(config, stage, samples, machines.gpus)
    ways = compare_ways(memory, machines.usable)
    chosen = cheapest(ways)
    plan = work = hours = None
    if chosen is not None:
        flops = count_flops(memory)
        plan = _plan(config, stage, samples, flops, min(memory.capacity, chosen.largest or 0), machines.gpus)
        work = stage_work(samples, flops, trained_rates(config, stage), settings.epochs, recomputes=chosen.recomputes)
        hours = work.hours(machines.device, machines.gpus, machines.mfu, plan.straggler)
    count = count_parameters(memory.model.parameters(), ways[0].sharding)
    return StageEstimate(stage, samples, count, memory.capacity, memory.longest, ways, chosen, plan, work, hours)


def count_flops(memory: StageMemory) -> Flops:
    """The model's FLOPs. Raises `UsageError` for a model that is not like Llama."""
    flops = model_flops(memory.model)
    if flops is None:
        raise UsageError(f"cannot count the FLOPs of {memory.model.config.llm}: its time is unknown, see --debug")
    return flops


def _plan(
    config: RunConfig, stage: StageName, samples: StageSamples, flops: Flops, capacity: int, ranks: int
) -> PlanReport:
    """What training's own planner makes of the first epoch."""
    settings = config.stage(stage)
    made = plan_epoch(
        samples.tokens,
        samples.tiles,
        capacity=capacity,
        batch_size=settings.batch_size,
        packs_per_step=settings.packs_per_step,
        seed=config.seed,
        epoch=0,
        cost=derive_cost(flops),
    )
    return measure(made, ranks)
