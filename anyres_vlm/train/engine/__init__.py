"""Ranks, devices and the optimizer step: the only package that knows accelerate and DeepSpeed."""

from anyres_vlm.train.engine.engine import Engine, StepResult
from anyres_vlm.train.engine.ranks import telling_lost_ranks
from anyres_vlm.train.engine.state import ReadTensor, Snapshot

__all__ = ["Engine", "ReadTensor", "Snapshot", "StepResult", "telling_lost_ranks"]
