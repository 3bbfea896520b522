"""`anyres report`: results of evaluations and probes as one page, to be read and believed only as far as they go."""

from __future__ import annotations

from pathlib import Path

import typer

from anyres_vlm.errors import UsageError


def report(
    runs: list[Path] = typer.Argument(
        ...,
        metavar="RUN...",
        help="Result folders or files of anyres eval, score --out, eval heldout --out and probe --out, or a training "
        "run's folder with an eval folder below it. Later runs are compared with the first.",
    ),
    out: Path = typer.Option(Path("report.html"), help="The HTML page; Markdown goes beside it."),
    images: Path | None = typer.Option(
        None, help="Folder where pictures are looked for by their file's name, if not where the results say."
    ),
    examples: int = typer.Option(6, min=0, max=100, help="Questions with their picture in a list of failures."),
) -> None:
    """Write one self-contained page: scores beside published ones, intervals, differences, failures with their tiles.

    Example: anyres report runs/a/stage2/eval runs/b/stage2/eval --out report.html
    """
    if out.suffix not in (".html", ".htm"):
        raise UsageError(f"--out {out}: expected a name that ends in .html")
    if images is not None and not images.is_dir():
        raise UsageError(f"--images {images}: no such folder")
    # Start-up time: NumPy.
    from anyres_vlm.evaluate.report.page import write_report
    from anyres_vlm.evaluate.report.pictures import Pictures
    from anyres_vlm.evaluate.report.results import read_runs
    from anyres_vlm.serve.tiling_picture import draw_tiling

    results, probes = read_runs(runs)
    beside = write_report(results, probes, out, Pictures(images, draw_tiling), examples)
    print(f"{out} and {beside}: {len(results)} results, {len(probes)} runs of probes")
