"""How long a stage takes, from its FLOPs and a stated share of the devices' peak."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from anyres_vlm.estimate.devices import Device
from anyres_vlm.estimate.samples import StageSamples
from anyres_vlm.flops import Flops, training_flops


@dataclass(frozen=True)
class Work:
    """FLOPs of a stage: useful ones, as MFU counts them, and those that checkpointing computes again."""

    useful: float
    recomputed: float

    def hours(self, device: Device, gpus: int, mfu: float, straggler: float = 1.0) -> float:
        """At an MFU that a busy rank reaches where nothing is computed again; others wait for the slowest rank."""
        return (self.useful + self.recomputed) * straggler / (gpus * device.peak * mfu * 3600)

    def implied_mfu(self, device: Device, gpus: int, hours: float) -> float:
        """The share of the peak that a run of so many hours made useful."""
        return self.useful / (gpus * device.peak * hours * 3600)


def stage_work(samples: StageSamples, flops: Flops, trained: Collection[str], epochs: int, *, recomputes: bool) -> Work:
    """Of all epochs of a stage. Checkpointing runs the language model's layers forward once more, not the head."""
    tokens = int(samples.tokens.sum())
    useful = training_flops(
        flops,
        trained,
        tokens=tokens,
        supervised_tokens=int(samples.supervised.sum()),
        pairs=samples.pairs,
        tiles=int(samples.tiles.sum()),
    )
    again = flops.token * tokens + flops.pair * samples.pairs if recomputes else 0.0
    return Work(epochs * useful, epochs * again)
