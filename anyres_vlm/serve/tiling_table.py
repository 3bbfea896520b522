"""What tilings cost, in words and tables of plain text; without torch or numpy, for it must start at once."""

from __future__ import annotations

from collections.abc import Sequence

from anyres_vlm.geometry import Size, TilePlan, Tiling, canvas_areas, choose_canvas

CANDIDATE_COLUMNS = ("canvas", "grid", "effective px", "of the image", "wasted px", "of the canvas", "")
BINS = 12  # bars of a histogram at most
BAR = 40  # characters of the longest


def describe_plan(plan: TilePlan) -> str:
    """Size, grid and the token bill of one image."""
    return (
        f"{plan.image.width}x{plan.image.height} -> {max(plan.grid.rows, 1)}x{max(plan.grid.cols, 1)} grid, "
        f"{plan.num_tiles} tile{'s'[: plan.num_tiles > 1]}, {plan.visual_tokens:,} visual + "
        f"{plan.newline_tokens} newline = {plan.total_tokens:,} tokens"
    )


def candidate_rows(size: Size, tiling: Tiling) -> list[tuple[str, ...]]:
    """Every candidate canvas in the order in which it is tried, under `CANDIDATE_COLUMNS`; the last marks the chosen.

    Sizes are written width x height, grids rows x columns.
    """
    rows: list[tuple[str, ...]] = []
    chosen = choose_canvas(size, tiling)
    for canvas in tiling.canvases:
        effective, waste = canvas_areas(size, canvas)
        rows.append(
            (
                f"{canvas.width}x{canvas.height}",
                f"{canvas.height // tiling.tile}x{canvas.width // tiling.tile}",
                f"{effective:,}",
                f"{effective / (size.height * size.width):.1%}",
                f"{waste:,}",
                f"{waste / (canvas.height * canvas.width):.1%}",
                "chosen" if canvas == chosen else "",
            )
        )
    return rows


def explain_choice(size: Size, tiling: Tiling) -> str:
    """Why this canvas, in one sentence."""
    chosen = choose_canvas(size, tiling)
    if chosen is None:
        return "There is no candidate canvas: the image is its thumbnail alone."
    best = canvas_areas(size, chosen)
    areas = [canvas_areas(size, canvas) for canvas in tiling.canvases]
    name = f"{chosen.width}x{chosen.height}"
    if len(areas) == 1:
        return f"{name} is the only candidate."
    if (equals := areas.count(best)) > 1:
        return f"{name} is the first, for dialect {tiling.dialect}, of {equals} that keep most and waste least."
    if (rivals := sum(other.effective == best.effective for other in areas)) > 1:
        return f"{name} wastes least of the {rivals} that keep most of the image."
    return f"{name} keeps most of the image."


def format_table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, the first to the left and the others to the right."""
    lines = [names, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def format_histogram(values: Sequence[int]) -> str:
    """Whole numbers by value, or in bins of equal width where they differ too much: range, count, bar."""
    low, width = min(values), max(-(-(max(values) - min(values) + 1) // BINS), 1)
    distinct = sorted(set(values))
    if len(distinct) <= BINS:
        ranges = [(value, value) for value in distinct]
    else:
        ranges = [(start, start + width - 1) for start in range(low, max(values) + 1, width)]
    counts = [sum(first <= value <= last for value in values) for first, last in ranges]
    names = [f"{first:,}" if first == last else f"{first:,} to {last:,}" for first, last in ranges]
    bars = ["#" * -(-count * BAR // max(counts)) for count in counts]
    widths = len(max(names, key=len)), len(f"{max(counts):,}")
    rows = zip(names, counts, bars, strict=True)
    return "\n".join(f"{name:>{widths[0]}}  {count:>{widths[1]},}  {bar}".rstrip() for name, count, bar in rows)
