"""What the probes found as one picture; above all, reading against text height with and without tiles."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

from anyres_vlm.evaluate.probes.run import THUMBNAIL


def draw_probes(scores: Mapping[str, Any], file: Path | BinaryIO) -> bool:
    """Draw reading by text height and counting by true count; False without matplotlib or without either probe."""
    if find_spec("matplotlib") is None or not {"reading", "counting"} & scores.keys():
        return False
    import matplotlib  # an optional extra

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (reading, counting) = pyplot.subplots(1, 2, figsize=(12, 4))
    for name, label, colour in (("reading", "AnyRes", "tab:blue"), (THUMBNAIL, "thumbnail alone", "tab:orange")):
        for factor, measure, title, style in (
            ("known height", "words", "known words", "--"),
            ("height", "words", "new words", "-"),
            ("height", "characters", "characters of new words", ":"),
        ):
            if rows := scores.get(name, {}).get(factor):
                heights, shares = [int(height) for height in rows], [row[measure] for row in rows.values()]
                reading.plot(heights, shares, style, marker="o", color=colour, label=f"{label}, {title}")
    reading.set(xlabel="height of a capital in the picture (pixels)", ylabel="share read", ylim=(0, 1))
    by_count = {int(true): row for true, row in scores.get("counting", {}).items() if true != "all"}
    counting.bar(list(by_count), [row["accuracy"] for row in by_count.values()], color="tab:blue")
    counting.set(xlabel="objects in the picture", ylabel="share counted right", ylim=(0, 1))
    for axis in (reading, counting):
        axis.grid(alpha=0.3)
    if reading.lines:
        reading.legend()
    figure.tight_layout()
    figure.savefig(file, format="png", dpi=110)
    pyplot.close(figure)
    return True
