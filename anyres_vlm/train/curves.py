"""The curves of a run, loss and learning rate, as one picture."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from anyres_vlm.train.metrics import METRICS_FILE, read_metrics

SMOOTHING = 0.9  # of the exponential mean drawn over the raw loss


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
