"""Write the report of an index: one self-contained HTML page with counts, figures, rejects and the longest samples."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from anyres_vlm.data.index.table import Index, count_rejects, num_images, summarise
from anyres_vlm.errors import UsageError
from anyres_vlm.geometry import Size, Tiling, plan_tiles

TEMPLATE = "report.html.j2"
EXAMPLES = 3  # of each kind of reject
LONGEST = 10  # records
INK, FAINT, PAPER = "#24292f", "#d8dee4", "#ffffff"
BLUE, ORANGE, GREEN, RED = "#2f6fb7", "#d9822b", "#3a8f5c", "#c2433d"
GRIDS = (BLUE, ORANGE, GREEN, "#8a63b8", RED, "#4aa3a2", "#b5892f", "#7a8791")  # most frequent first, the last: others
SIZE, DPI = (7.2, 3.9), 144  # inches, and pixels an inch
BINS = 60


def draw_report(index: Index) -> Path:
    """Write the page and its figures next to the index. Returns the path of the page.

    Raises `UsageError` if matplotlib, an optional extra, is not installed.
    """
    require_matplotlib()
    figures = []
    for name, title, draw in FIGURES:
        figure, axes = _new_figure()
        if caption := draw(axes, index):
            buffer = BytesIO()
            figure.savefig(buffer, format="png", metadata={"Software": None})  # no version of matplotlib in the bytes
            png = buffer.getvalue()
            index.path.with_name(f"{index.path.name}.report-{name}.png").write_bytes(png)
            figures.append((title, caption, base64.b64encode(png).decode()))
    page = index.path.with_name(f"{index.path.name}.report.html")
    page.write_text(_page(index, figures), encoding="utf-8")
    return page


def require_matplotlib() -> None:
    """Raise `UsageError` naming the extra to install if matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise UsageError("--report draws with matplotlib: pip install 'anyres-vlm[demo]', or leave --report out")


# Each draws a figure and returns its caption, or an empty string if the index has no data for it.


def _draw_tokens(axes: Any, index: Index) -> str:
    tokens = index.tokens[index.ok]
    if not len(tokens):
        return ""
    axes.hist(tokens, bins=BINS, color=BLUE)
    for share, colour, name in ((50, INK, "median"), (95, ORANGE, "95%")):
        value = float(np.percentile(tokens, share))
        axes.axvline(value, color=colour, linewidth=1.2, linestyle="--", label=f"{name}: {value:,.0f}")
    axes.set(xlabel="tokens a sample", ylabel="samples")
    axes.legend(frameon=False)
    return "Sample lengths: positions in the language model's sequence, images included."


def _draw_parts(axes: Any, index: Index) -> str:
    text, visual = (index.numbers(name)[index.ok] for name in ("text_tokens", "visual_tokens"))
    if not len(text):
        return ""
    from matplotlib.colors import LogNorm  # an optional extra

    bins = [np.linspace(0, max(int(values.max()), 1) * 1.02, 48) for values in (text, visual)]
    mesh = axes.hist2d(text, visual, bins=bins, cmin=1, norm=LogNorm(vmin=1), cmap="YlGnBu")[3]
    axes.figure.colorbar(mesh, ax=axes, label="samples", format=_thousands())
    axes.set(xlabel="text tokens a sample", ylabel="visual tokens a sample")
    return "Text and visual tokens: each square counts samples. Text-only samples are at 0 visual tokens."


def _draw_tiles(axes: Any, index: Index) -> str:
    tiles = index.tiles[index.ok]
    if not len(tiles):
        return ""
    numbers, counts = np.unique(tiles, return_counts=True)
    axes.bar(numbers, counts, color=GREEN, width=0.8)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="tiles a sample, thumbnails included", ylabel="samples")
    return "Tiles to encode for a sample; 0 is text only."


def _draw_aspects(axes: Any, index: Index) -> str:
    sizes = _count_sizes(index)
    if not sizes:
        return ""
    settings = index.settings
    pinpoints = tuple((first, second) for first, second in settings["pinpoints"])
    tiling = Tiling(pinpoints, settings["tile"], settings["patch"], settings["layout"], settings["dialect"])
    ratios = np.array([size.width / size.height for size in sizes])
    weights = np.array(list(sizes.values()))
    grids = [plan_tiles(size, tiling).grid for size in sizes]
    names = [f"{grid.rows} x {grid.cols}" if grid.rows else "thumbnail only" for grid in grids]
    totals: Counter[str] = Counter()
    for name, weight in zip(names, weights, strict=True):
        totals[name] += int(weight)
    shown = [name for name, _ in totals.most_common(len(GRIDS) - 1)]
    groups = shown + (["others"] if len(totals) > len(shown) else [])
    group = np.array([shown.index(name) if name in shown else len(shown) for name in names])
    low, high = np.log2(ratios.min()) - 0.1, np.log2(ratios.max()) + 0.1
    axes.hist(
        [ratios[group == number] for number in range(len(groups))],
        weights=[weights[group == number] for number in range(len(groups))],
        bins=2 ** np.linspace(low, high, BINS),
        stacked=True,
        color=GRIDS[: len(groups)],
        label=[f"{name} ({totals[name]:,})" if name in totals else name for name in groups],
    )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda ratio, _: f"{ratio:g}" if ratio >= 1 else f"1/{1 / ratio:g}")
    axes.set(xlabel="width / height", ylabel="images")
    axes.legend(frameon=False, fontsize=8, title="rows x columns of tiles", title_fontsize=8)
    return "Aspect ratios of the images, and the grid of tiles that is chosen for them."


def _count_sizes(index: Index) -> Counter[Size]:
    """Return the number of images of each size in the good samples."""
    chosen = pa.array(np.repeat(index.ok, num_images(index)))
    pixels = [pc.list_flatten(index.column(name)).filter(chosen).to_numpy() for name in ("heights", "widths")]
    sides: NDArray[np.int64] = np.stack(pixels, axis=1)
    unique, counts = np.unique(sides, axis=0, return_counts=True)
    pairs = zip(unique.tolist(), counts.tolist(), strict=True)
    return Counter({Size(height=height, width=width): count for (height, width), count in pairs})


def _draw_supervised(axes: Any, index: Index) -> str:
    tokens = index.tokens[index.ok]
    if not len(tokens):
        return ""
    share = index.supervised[index.ok] / tokens
    axes.hist(share * 100, bins=BINS, color=ORANGE)
    whole = index.supervised[index.ok].sum() / tokens.sum() * 100
    axes.axvline(whole, color=INK, linewidth=1.2, linestyle="--", label=f"of all tokens: {whole:.1f}%")
    axes.set(xlabel="supervised share of a sample's tokens, %", ylabel="samples")
    axes.legend(frameon=False)
    return "Share of the tokens of a sample that count in the loss."


def _draw_rejects(axes: Any, index: Index) -> str:
    counts = count_rejects(index)
    if not counts:
        return ""
    kinds = list(counts)[::-1]
    bars = axes.barh(range(len(kinds)), [counts[kind] for kind in kinds], color=RED)
    axes.set_yticks(range(len(kinds)), [kind.replace("_", " ") for kind in kinds])
    axes.bar_label(bars, labels=[f"{counts[kind]:,}" for kind in kinds], padding=4, color=INK)
    axes.set(xlabel="records", xlim=(0, max(counts.values()) * 1.15))
    axes.grid(axis="y", visible=False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return "Rejected records by reason; the rejects file lists all of them."


FIGURES = (  # name of the file, title, function
    ("tokens", "Tokens", _draw_tokens),
    ("parts", "Text and image", _draw_parts),
    ("tiles", "Tiles", _draw_tiles),
    ("aspects", "Aspect ratios", _draw_aspects),
    ("supervised", "Supervised share", _draw_supervised),
    ("rejects", "Rejects", _draw_rejects),
)


def _new_figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # an optional extra; without pyplot there is no state and no display

    figure = Figure(figsize=SIZE, dpi=DPI, facecolor=PAPER, layout="constrained")
    axes = figure.subplots()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(_thousands())
        axis.label.set_color(INK)
    return figure, axes


def _thousands() -> Any:
    from matplotlib.ticker import FuncFormatter  # an optional extra

    return FuncFormatter(lambda value, _: f"{value:,.6g}")


def _page(index: Index, figures: Sequence[tuple[str, str, str]]) -> str:
    """Return the page; a figure is its title, caption and PNG in base64."""
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
        figures=figures,
        changes=list(index.changes.items()),
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
    """Return the first few rejects of each kind: kind, id, row, reason."""
    shown: dict[str, list[Sequence[Any]]] = {}
    for reject in index.rejects(["id", "row", "status", "reason"]):
        kind = shown.setdefault(reject["status"], [])
        if len(kind) < EXAMPLES:
            kind.append((reject["status"].replace("_", " "), reject["id"], reject["row"], reject["reason"]))
    return [row for kind in sorted(shown) for row in shown[kind]]


def _longest(index: Index) -> list[Sequence[Any]]:
    """Return the longest samples: id, counts and the sizes of their images."""
    good = np.flatnonzero(index.ok)
    places = good[np.argsort(-index.tokens[good], kind="stable")[:LONGEST]].tolist()
    columns = [index.numbers(name) for name in ("tokens", "visual_tokens", "text_tokens", "supervised", "tiles", "row")]
    rows: list[Sequence[Any]] = []
    for place in places:
        sizes = ", ".join(f"{size.width}x{size.height}" for size in index.sizes(place))
        rows.append((index.id(place), *(int(column[place]) for column in columns), sizes or "text only"))
    return rows
