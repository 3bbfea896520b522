"""The table of a sweep as one picture: a panel a number, a line a row, a point a seed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from anyres_vlm.ablate.markdown import label
from anyres_vlm.ablate.table import Number, Table

COLOURS = {"shown": "tab:blue", None: "black"}  # grey: the difference is not shown


def draw_table(table: Table, path: Path) -> Path | None:
    """Draw each row's seeds and mean, the baseline's range as a band; None without matplotlib."""
    if find_spec("matplotlib") is None:
        return None
    import matplotlib  # an optional extra

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (3 + 3.2 * len(table.titles), 1.4 + 0.32 * len(table.rows))
    figure, axes = pyplot.subplots(1, len(table.titles), figsize=size, sharey=True, squeeze=False)
    for axis, title in zip(axes[0], table.titles, strict=True):
        numbers = [row.numbers[title] for row in table.rows]
        if base := list(numbers[0].by_seed.values()):
            axis.axvspan(min(base), max(base), color="0.9")
        for place, number in enumerate(numbers):
            _draw(axis, place, number)
        axis.set(xlabel=title, yticks=range(len(table.rows)), yticklabels=[label(row) for row in table.rows])
        axis.grid(axis="x", alpha=0.3)
    axes[0][0].set_ylim(len(table.rows) - 0.5, -0.5)  # the baseline on top
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _draw(axis: Any, place: int, number: Number) -> None:
    colour = COLOURS.get(number.verdict, "0.6")
    axis.plot(list(number.by_seed.values()), [place] * len(number.by_seed), ".", color=colour)
    if number.mean is not None:
        axis.plot(number.mean, place, "|", color=colour, markersize=16)
