"""AdamW in parameter groups, and linear warm-up followed by a cosine."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from anyres_vlm.config import StageConfig
from anyres_vlm.train.stage import part_of


def build_optimizer(model: nn.Module, rates: Mapping[str, float], weight_decay: float) -> AdamW:
    """AdamW over what requires gradients, each part at its own rate; biases and norms are never decayed."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((rates[part_of(name)], decay), []).append(parameter)
    return AdamW(
        [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()],
        fused=torch.cuda.is_available(),
    )


def rate_factor(step: int, total_steps: int, warmup_ratio: float, floor: float) -> float:
    """Share of the peak rate: linear over the first `ceil(ratio * total)` steps, then cosine down to `floor`."""
    warmup = math.ceil(warmup_ratio * total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(total_steps - warmup, 1)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def build_schedule(optimizer: AdamW, settings: StageConfig, total_steps: int, finished: int) -> LambdaLR:
    """The schedule of one stage, a step each optimizer step, as it stands after the finished ones."""
    floor = settings.eta_min / settings.learning_rate
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return LambdaLR(
        optimizer, lambda step: rate_factor(step, total_steps, settings.warmup_ratio, floor), last_epoch=finished - 1
    )
