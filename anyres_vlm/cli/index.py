"""`anyres index`: count tokens and tiles of a dataset, and list its broken records."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, Literal

import typer

from anyres_vlm.cli.options import CONFIG, DIALECT, GRID, LAYOUT, SETTINGS
from anyres_vlm.geometry import Dialect, Layout


def index(
    data: Path = typer.Argument(..., help="Records: LLaVA JSON or JSONL, or another source that training reads."),
    images: Path | None = typer.Option(None, help="Image folder; default: the data's own folder."),
    out: Path = typer.Option(..., help="Parquet file to write; rejects are listed in OUT.rejects.jsonl."),
    config: Path | None = CONFIG,
    stage: Literal["1", "2"] = typer.Option("2", help="Stage whose template, max_length and limit on rejects to use."),
    grid: str | None = GRID,
    layout: Layout | None = LAYOUT,
    dialect: Dialect | None = DIALECT,
    image_position: Literal["front", "as_is"] | None = typer.Option(
        None, help="front moves a question's only <image> to the start, as LLaVA does. Default: the config's."
    ),
    settings: list[str] = SETTINGS,
    max_bad_fraction: float | None = typer.Option(
        None, min=0.0, max=1.0, help="Largest share of rejects; default: the config's."
    ),
    workers: int | None = typer.Option(None, min=1, help="Number of processes; default: one per core."),
    shard: str | None = typer.Option(
        None, metavar="I/N", help="Index the I-th of N ranges of rows, from 1; the last process to finish merges them."
    ),
    rebuild: bool = typer.Option(False, "--rebuild", help="Read everything again, if images were replaced."),
    report: bool = typer.Option(False, "--report", help="Write OUT.report.html and its figures."),
    as_json: bool = typer.Option(False, "--json", help="Print the summary as one JSON object."),
) -> None:
    """Count the tokens, tiles and labels of every sample from headers and text, and list broken records.

    Rerun to resume after an interruption; an index that is up to date is not rebuilt.

    Example: anyres index data.json --images images --out index.parquet --report
    """
    # Start-up time: transformers and pyarrow take a second to import.
    from anyres_vlm.checkpoints.describe import describe_model
    from anyres_vlm.cli.progress import show_rows
    from anyres_vlm.config import load_config, shipped_config, tiling_flags
    from anyres_vlm.data.conversation import ConversationTokenizer
    from anyres_vlm.data.index.build import Shard, build_index
    from anyres_vlm.data.index.report import draw_report, require_matplotlib
    from anyres_vlm.data.index.rows import IndexSettings
    from anyres_vlm.data.index.table import summarise

    if report:
        require_matplotlib()
    run_config = load_config(config or shipped_config("tiny"), settings, tiling_flags(grid, layout, dialect))
    stage_config = run_config.stage("stage1" if stage == "1" else "stage2")
    model, tiling, tokenizer = describe_model(run_config.model)
    position = image_position or stage_config.data.image_position
    conversation = ConversationTokenizer(stage_config.template or model.template, tokenizer, position)
    began = time.perf_counter()
    with show_rows("indexing") as progress:
        built = build_index(
            data,
            images,
            IndexSettings(conversation, tiling, stage_config.max_length),
            out,
            workers=workers or os.cpu_count() or 1,
            max_bad_fraction=stage_config.data.max_bad_fraction if max_bad_fraction is None else max_bad_fraction,
            shard=None if shard is None else Shard.parse(shard),
            rebuild=rebuild,
            progress=progress,
        )
    seconds = time.perf_counter() - began
    summary = summarise(built.index) | {"rows_read": built.rows_read, "seconds": round(seconds, 3)}
    is_full = built.rows_read == summary["samples"]
    summary["images_per_second"] = round(summary["images"] / seconds, 1) if is_full else None
    summary["missing_shards"] = [f"{other.number}/{other.count}" for other in built.missing]
    summary["report"] = str(draw_report(built.index)) if report else None
    if as_json:
        print(json.dumps(summary, indent=2))
    else:
        _print(summary)


def _print(summary: dict[str, Any]) -> None:
    tokens, bad = summary["tokens"], sum(summary["rejects"].values())
    made = f"made in {summary['seconds']:,.1f} s" if summary["rows_read"] else "up to date"
    if summary["images_per_second"]:
        made += f", {summary['images_per_second']:,.0f} images/s"
    print(f"index:    {summary['index']} ({made})")
    print(
        f"samples:  {summary['ok']:,} of {summary['samples']:,}, {summary['images']:,} images, "
        f"{summary['tiles']:,} tiles"
    )
    print(
        f"tokens:   {tokens['total']:,} = {summary['visual_tokens']:,} visual + {summary['newline_tokens']:,} newline "
        f"+ {summary['text_tokens']:,} text; {summary['supervised']:,} supervised"
    )
    print(
        f"sample:   mean {tokens['mean']:,.0f}, median {tokens['median']:,.0f}, 95% up to {tokens['p95']:,.0f}, "
        f"longest {tokens['max']:,} tokens"
    )
    if bad:
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in summary["rejects"].items())
        print(f"rejects:  {bad:,} ({kinds}): {summary['rejects_file']}")
    for change, count in summary["changes"].items():
        print(f"changed:  {change}: {count:,}")
    if summary["missing_shards"]:
        print(f"waiting:  for shards {', '.join(summary['missing_shards'])}; the last to finish merges them")
    if summary["report"]:
        print(f"report:   {summary['report']}")
