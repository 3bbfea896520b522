"""The index report: one self-contained HTML page with counts, figures, rejects and the longest samples."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow.compute as pc

from anyres_vlm.data.index.summary import summarise
from anyres_vlm.data.index.table import OK, Index
from anyres_vlm.geometry import Tiling
from anyres_vlm.serve.index_figures import Figures, draw_figures

TITLES = {
    "tokens": "Tokens",
    "parts": "Text and image",
    "tiles": "Tiles",
    "aspects": "Aspect ratios",
    "supervised": "Supervised share",
    "rejects": "Rejects",
}
EXAMPLES = 3  # of each kind of reject
LONGEST = 10  # records
TEMPLATE = "index.html.j2"


def draw_report(index: Index) -> Path:
    """Write the page and its figures next to the index. Returns the path of the page.

    Raises `UsageError` if matplotlib, an optional extra, is not installed.
    """
    settings = index.settings
    pinpoints = tuple((first, second) for first, second in settings["pinpoints"])
    tiling = Tiling(pinpoints, settings["tile"], settings["patch"], settings["layout"], settings["dialect"])
    figures = draw_figures(index, tiling)
    for name, (_, png) in figures.items():
        index.path.with_name(f"{index.path.name}.report-{name}.png").write_bytes(png)
    page = index.path.with_name(f"{index.path.name}.report.html")
    page.write_text(_page(index, figures), encoding="utf-8")
    return page


def _page(index: Index, figures: Figures) -> str:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    template = jinja2.Environment(loader=loader, autoescape=True, keep_trailing_newline=True).get_template(TEMPLATE)
    summary, settings = summarise(index), index.settings
    grids = f"{len(settings['pinpoints'])} canvases" if settings["pinpoints"] else "thumbnail only"
    return template.render(
        title=f"{index.metadata['source']['name']}: {summary['samples']:,} records",
        settings=(
            f"{grids} of {settings['tile']} px tiles, {settings['tile'] // settings['patch']}\u00b2 patches a tile, "
            f"{settings['layout']}, dialect {settings['dialect']}, template {settings['template']}, "
            f"samples up to {settings['max_length']:,} tokens"
        ),
        numbers=_numbers(summary),
        figures=[(TITLES[name], caption, base64.b64encode(png).decode()) for name, (caption, png) in figures.items()],
        rejects_title=f"Rejects: up to {EXAMPLES} of each kind",
        rejects=_rejects(index),
        longest=_longest(index),
        key=index.key,
    )


def _numbers(summary: dict[str, Any]) -> list[tuple[str, str]]:
    tokens, bad = summary["tokens"], sum(summary["rejects"].values())
    share = summary["supervised"] / max(tokens["total"], 1)
    return [
        (f"{summary['ok']:,}", "samples"),
        (f"{bad:,}", f"rejects ({bad / max(summary['samples'], 1):.2%})"),
        (f"{summary['images']:,}", "images"),
        (f"{summary['tiles']:,}", "tiles"),
        (f"{tokens['total']:,}", "tokens"),
        (f"{summary['visual_tokens']:,}", "visual tokens"),
        (f"{summary['newline_tokens']:,}", "newline tokens"),
        (f"{summary['text_tokens']:,}", "text tokens"),
        (f"{summary['supervised']:,}", f"supervised ({share:.1%})"),
        (f"{tokens['mean']:,.0f}", "tokens a sample, mean"),
        (f"{tokens['median']:,.0f}", "median"),
        (f"{tokens['max']:,}", "longest"),
    ]


def _rejects(index: Index) -> list[Sequence[Any]]:
    """The first few of every kind: kind, id, row, reason."""
    shown: dict[str, list[Sequence[Any]]] = {}
    for batch in index.batches(["id", "row", "status", "reason"]):
        for reject in batch.filter(pc.not_equal(batch["status"], OK)).to_pylist():
            kind = shown.setdefault(reject["status"], [])
            if len(kind) < EXAMPLES:
                kind.append((reject["status"].replace("_", " "), reject["id"], reject["row"], reject["reason"]))
    return [row for kind in sorted(shown) for row in shown[kind]]


def _longest(index: Index) -> list[Sequence[Any]]:
    """The longest good samples with the sizes of their images."""
    good = np.flatnonzero(index.ok)
    places = good[np.argsort(-index.tokens[good], kind="stable")[:LONGEST]].tolist()
    columns = [index.numbers(name) for name in ("tokens", "visual_tokens", "text_tokens", "supervised", "tiles", "row")]
    rows: list[Sequence[Any]] = []
    for place in places:
        sizes = ", ".join(f"{size.width}x{size.height}" for size in index.sizes(place))
        rows.append((index.id(place), *(int(column[place]) for column in columns), sizes or "text only"))
    return rows
