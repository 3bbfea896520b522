"""What a stage leaves for people: curves of loss and learning rate, and its part of the model card."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from anyres_vlm.checkpoints.card import table
from anyres_vlm.config import RunConfig, StageName, load_config
from anyres_vlm.data.index.table import Index, summarise
from anyres_vlm.train.metrics import METRICS_FILE, read_metrics
from anyres_vlm.train.options import CONFIG_FILE

SMOOTHING = 0.9  # of the exponential mean drawn over the raw loss
SHOWN_STEPS = 20  # whose losses are averaged for the card: single ones are noisy


def draw_curves(run: Path) -> Path | None:
    """Draw both stages' loss and learning rate into `run/loss.png`.

    Returns None where matplotlib is not installed or nothing is recorded.
    """
    if find_spec("matplotlib") is None:
        return None
    import matplotlib  # an optional extra

    matplotlib.use("Agg")
    from matplotlib import pyplot

    stages = [stage for stage in ("stage1", "stage2") if (run / stage / METRICS_FILE).exists()]
    if not stages:
        return None
    figure, axes = pyplot.subplots(1, len(stages), figsize=(6 * len(stages), 4), squeeze=False)
    for axis, stage in zip(axes[0], stages, strict=True):
        rows = [row for row in read_metrics(run / stage / METRICS_FILE) if "train/loss" in row]  # of finite steps
        steps, losses = [row["step"] for row in rows], [row["train/loss"] for row in rows]
        axis.plot(steps, losses, color="0.8", linewidth=1)
        axis.plot(steps, _smooth(losses), color="tab:blue")
        axis.set(title=stage, xlabel="optimizer step", ylabel="loss (nats a supervised token)", ylim=(0, None))
        axis.grid(alpha=0.3)
        rate = axis.twinx()
        rate.plot(steps, [row["train/learning_rate"] for row in rows], color="tab:orange", linestyle=":")
        rate.set(ylabel="learning rate (dotted)", ylim=(0, None))
    figure.tight_layout()
    figure.savefig(run / "loss.png", dpi=110)
    pyplot.close(figure)
    return run / "loss.png"


def _smooth(losses: list[float]) -> list[float]:
    """Exponential mean, corrected for its start."""
    smooth, mean = [], 0.0
    for count, loss in enumerate(losses, start=1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        smooth.append(mean / (1 - SMOOTHING**count))
    return smooth


def stage_sections(output: Path, stages: dict[StageName, Index]) -> list[str]:
    """Describe the stages of a run in Markdown: recipe, data, token statistics and losses, a column each."""
    rows: dict[str, list[str]] = {}
    for stage, index in stages.items():
        config = load_config(output / stage / CONFIG_FILE)
        facts = {**_recipe(config, stage), **_data(config, stage, index), **outcome(output / stage)}
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


def outcome(folder: Path) -> dict[str, str]:
    """Return the steps and losses of a stage's folder; a step that was not finite has no loss."""
    rows = read_metrics(folder / METRICS_FILE)
    losses = [row["train/loss"] for row in rows if "train/loss" in row]  # of finite steps
    last = losses[-SHOWN_STEPS:]
    loss = f"{losses[0]:.3f} at first, {np.mean(last):.3f} over the last {len(last)} steps" if losses else "none"
    return {"steps": f"{len(rows):,}", "loss": loss}
