"""What a model card says of the stages that a model went through: recipe, data, token statistics and losses."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from anyres_vlm.config import RunConfig, StageName, load_config
from anyres_vlm.data.index.summary import summarise
from anyres_vlm.data.index.table import Index
from anyres_vlm.model.card import table
from anyres_vlm.train.metrics import METRICS_FILE, read_metrics

SHOWN_STEPS = 20  # whose losses are averaged: single ones are noisy


def stage_sections(output: Path, stages: dict[StageName, Index]) -> list[str]:
    """Markdown on the stages of a run, each with the index of its data."""
    rows: dict[str, list[str]] = {}
    for stage, index in stages.items():
        config = load_config(output / stage / "config.yaml")
        facts = {**_recipe(config, stage), **_data(config, stage, index), **_outcome(output / stage)}
        for name, fact in facts.items():
            rows.setdefault(name, []).append(fact)
    return [f"## How it was trained\n\n{table(('', *stages), ([name, *facts] for name, facts in rows.items()))}"]


def _recipe(config: RunConfig, stage: StageName) -> dict[str, str]:
    settings = config.stage(stage)
    vision = "" if settings.vision_lr is None else f", encoder {settings.vision_lr:g}"
    return {
        "learning rate": f"{settings.learning_rate:g}{vision}",
        "batch": f"{settings.batch_size} samples, packs of {settings.capacity:,} tokens",
        "schedule": f"{settings.warmup_ratio:.0%} warm-up, cosine to {settings.eta_min:g}",
        "weight decay": f"{settings.weight_decay:g}",
        "epochs": f"{settings.epochs}",
        "precision, seed": f"{config.precision}, {config.seed}",
    }


def _data(config: RunConfig, stage: StageName, index: Index) -> dict[str, str]:
    data, found = config.stage(stage).data, summarise(index)
    tokens = found["tokens"]
    return {
        "data": str(data.path or f"rendered {data.rendered}"),
        "samples": f"{found['ok']:,}",
        "left out": ", ".join(f"{count:,} {kind}" for kind, count in found["rejects"].items()) or "none",
        "tokens": f"{tokens['total']:,}, {found['visual_tokens'] / max(tokens['total'], 1):.0%} visual",
        "supervised tokens": f"{found['supervised']:,}",
        "tokens a sample": f"mean {tokens['mean']:,.0f}, longest {tokens['max']:,}",
        "images, tiles": f"{found['images']:,}, {found['tiles']:,}",
    }


def _outcome(folder: Path) -> dict[str, str]:
    losses = [row["train/loss"] for row in read_metrics(folder / METRICS_FILE)]
    last = losses[-SHOWN_STEPS:]
    return {
        "steps": f"{len(losses):,}",
        "loss": f"{losses[0]:.3f} at first, {np.mean(last):.3f} over the last {len(last)} steps",
    }
