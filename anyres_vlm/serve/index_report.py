"""An index as one HTML page that needs nothing else: numbers, pictures, what is left out, the longest records."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

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
STYLE = """
:root { color-scheme: light dark; --ink: #24292f; --faint: #66707b; --line: #d8dee4; --page: #f6f8fa; --card: #fff }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --faint: #9aa5b1; --line: #30363d; --page: #0d1117; --card: #161b22 }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif }
main { max-width: 1120px; margin: 0 auto; padding: 36px 20px 64px }
h1 { font-size: 26px; margin: 0 0 4px; overflow-wrap: anywhere }
h2 { font-size: 17px; margin: 0 0 4px }
p { margin: 0 0 12px; color: var(--faint) }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); gap: 12px; margin: 22px 0 }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(480px, 100%), 1fr)); gap: 16px }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px; min-width: 0 }
.number { font-size: 24px; font-weight: 600; font-variant-numeric: tabular-nums }
.label { color: var(--faint); font-size: 13px }
img { display: block; width: 100%; height: auto; border-radius: 6px; background: #fff }
section.card { margin-top: 16px }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: 14px }
th { text-align: left; color: var(--faint); font-weight: 500 }
th, td { padding: 6px 12px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere }
tr:last-child td { border-bottom: 0 }
td.count, th.count { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
"""


def draw_report(index: Index) -> Path:
    """Write the page and its pictures beside the index. Returns the page's path.

    Raises `UsageError` where matplotlib, an optional extra, is not installed.
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
    summary = summarise(index)
    settings = index.settings
    title = f"{index.metadata['source']['name']}: {summary['samples']:,} records"
    grids = f"{len(settings['pinpoints'])} canvases" if settings["pinpoints"] else "the thumbnail alone"
    what = (
        f"{grids} of {settings['tile']} px tiles, {settings['tile'] // settings['patch']}² patches a tile, "
        f"{settings['layout']}, dialect {settings['dialect']}, template {settings['template']}, "
        f"samples up to {settings['max_length']:,} tokens"
    )
    pictures = "".join(_figure(TITLES[name], shows, png) for name, (shows, png) in figures.items())
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(title)}</h1>\n<p>{escape(what)}</p>\n"
        f'<div class="numbers">{_numbers(summary)}</div>\n<div class="figures">{pictures}</div>\n'
        f"{_changes(index)}{_rejects(index)}{_longest(index)}"
        f'<p style="margin-top: 20px">Key {escape(index.key)}</p>\n</main>\n</body>\n</html>\n'
    )


def _numbers(summary: dict[str, Any]) -> str:
    tokens, bad = summary["tokens"], sum(summary["rejects"].values())
    share = summary["supervised"] / max(tokens["total"], 1)
    pairs = [
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
    cell = '<div class="card"><div class="number">{}</div><div class="label">{}</div></div>'
    return "".join(cell.format(number, label) for number, label in pairs)


def _figure(title: str, shows: str, png: bytes) -> str:
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return f'<div class="card"><h2>{title}</h2><p>{escape(shows)}</p><img alt="{escape(shows)}" src="{source}"></div>'


def _changes(index: Index) -> str:
    if not index.changes:
        return ""
    return _table("Changed while reading", ("change", "samples"), list(index.changes.items()))


def _rejects(index: Index) -> str:
    """The first few of every kind."""
    shown: dict[str, list[Sequence[Any]]] = {}
    for batch in index.batches(["id", "row", "status", "reason"]):
        for reject in batch.filter(pc.not_equal(batch["status"], OK)).to_pylist():
            kind = shown.setdefault(reject["status"], [])
            if len(kind) < EXAMPLES:
                kind.append((reject["status"].replace("_", " "), reject["id"], reject["row"], reject["reason"]))
    rows = [row for kind in sorted(shown) for row in shown[kind]]
    if not rows:
        return ""
    return _table(f"Rejects: up to {EXAMPLES} of each kind", ("kind", "id", "row", "reason"), rows)


def _longest(index: Index) -> str:
    good = np.flatnonzero(index.ok)
    places = good[np.argsort(-index.tokens[good], kind="stable")[:LONGEST]]
    if not len(places):
        return ""
    columns = [index.numbers(name) for name in ("tokens", "visual_tokens", "text_tokens", "supervised", "tiles", "row")]
    rows = []
    for place in places:
        sizes = ", ".join(f"{size.width}x{size.height}" for size in index.sizes(int(place)))
        rows.append((index.id(int(place)), *(int(column[place]) for column in columns), sizes or "text only"))
    names = ("id", "tokens", "visual", "text", "supervised", "tiles", "row", "images, width x height")
    return _table(f"The {len(rows)} longest samples", names, rows)


def _table(title: str, names: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    rows = list(rows)
    kinds = [' class="count"' if isinstance(value, int) else "" for value in rows[0]]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for name, kind in zip(names, kinds, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{_cell(value)}</td>" for value, kind in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows
    )
    return (
        f'<section class="card"><h2>{escape(title)}</h2><div class="scroll">'
        f"<table><tr>{head}</tr>{body}</table></div></section>\n"
    )


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else escape(str(value))
