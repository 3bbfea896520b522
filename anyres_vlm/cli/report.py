"""`anyres report`: write results of evaluations and probes as one page, with confidence intervals."""

from __future__ import annotations

from pathlib import Path

import typer

from anyres_vlm.errors import UsageError


def report(
    runs: list[Path] = typer.Argument(
        ...,
        metavar="RUN...",
        help="Result folders or files of anyres eval, score --out and probe --out, or the folder of a training run "
        "with an eval folder in it. Later runs are compared with the first.",
    ),
    out: Path = typer.Option(Path("report.html"), help="HTML page; a Markdown file is written next to it."),
    images: Path | None = typer.Option(
        None, help="Folder with the images, by file name; default: the paths in the results."
    ),
    examples: int = typer.Option(6, min=0, max=100, help="Questions with their image in each list."),
) -> None:
    """Write a self-contained page: published scores, intervals, paired comparisons, failures with their tiles.

    Example: anyres report runs/a/stage2/eval runs/b/stage2/eval --out report.html
    """
    if out.suffix not in (".html", ".htm"):
        raise UsageError(f"--out {out}: expected a name ending in .html")
    if images is not None and not images.is_dir():
        raise UsageError(f"--images {images}: no such folder")
    # Start-up time: NumPy.
    from anyres_vlm.data.tile_picture import draw_tiling
    from anyres_vlm.evaluate.report.page import Images, write_report
    from anyres_vlm.evaluate.report.results import read_runs

    results, probes = read_runs(runs)
    markdown = write_report(results, probes, out, Images(images, draw_tiling), examples)
    print(f"{out} and {markdown}: {len(results)} results, {len(probes)} runs of probes")
