"""`anyres plan`: pack an index into optimizer steps and report the costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from anyres_vlm.errors import DataError, UsageError

if TYPE_CHECKING:
    import pyarrow as pa

    from anyres_vlm.data.packing.cost import CostModel
    from anyres_vlm.data.packing.plan import Plan


def plan(
    index: Path = typer.Argument(..., help="Parquet with integer columns `tokens` and `tiles`; see anyres index."),
    capacity: int = typer.Option(16_384, min=1, help="Maximum tokens in a pack."),
    ranks: int = typer.Option(8, min=1, help="Ranks (GPUs) that share a step's packs."),
    batch_size: int = typer.Option(128, min=1, help="Samples per optimizer step, approximately."),
    packs_per_step: int | None = typer.Option(None, min=1, help="Packs per optimizer step; replaces --batch-size."),
    seed: int = typer.Option(0, help="Seed of the shuffle."),
    epoch: int = typer.Option(0, min=0, help="Epoch; each has a different order."),
    model_config: Path | None = typer.Option(
        None,
        "--model-config",
        "--config",
        help="Model to derive costs from: a run's YAML, or a folder with a config.json.",
    ),
    out: Path | None = typer.Option(None, help="Write Parquet: sample, pack, step, micro_step, rank."),
    as_json: bool = typer.Option(False, "--json", help="Print the report as JSON."),
) -> None:
    """Pack a dataset into optimizer steps and report efficiency and balance.

    Example: anyres plan index.parquet --capacity 16384 --ranks 64 --batch-size 128
    """
    # Start-up time: numpy, numba and pyarrow take a second to import.
    from dataclasses import asdict

    import numpy as np

    from anyres_vlm.data.packing.plan import plan_epoch
    from anyres_vlm.data.packing.report import measure

    cost, origin = _cost(model_config)
    table = _read(index)
    ids = np.arange(table.num_rows)
    if "status" in table.column_names:
        ids = ids[table["status"].to_numpy() == "ok"]
    if len(ids) == 0:
        raise DataError(f"{index}: no samples to plan: none of its {table.num_rows} rows has status ok")
    columns = {name: table[name].to_numpy().astype(np.int64)[ids] for name in ("tokens", "tiles")}
    _check(index, ids, columns, capacity)
    made = plan_epoch(
        **columns,
        capacity=capacity,
        batch_size=batch_size,
        seed=seed,
        epoch=epoch,
        cost=cost,
        packs_per_step=packs_per_step,
    )
    figures: dict[str, Any] = {"key": made.key, **asdict(measure(made, ranks))}
    figures |= {
        "cost_square": cost.square,
        "cost_tile": cost.tile,
        "cost_from": origin,
        "left_out": table.num_rows - len(ids),
    }
    if "supervised" in table.column_names:
        figures["supervised_tokens"] = int(table["supervised"].to_numpy()[ids].sum())
    if out is not None:
        write_plan(made, ids, ranks, out)
    print(json.dumps(figures, indent=2) if as_json else _describe(figures))


def _cost(model: Path | None) -> tuple[CostModel, str]:
    """Return the cost model and a note on its origin."""
    from anyres_vlm.data.packing.cost import CostModel, derive_cost, read_cost

    if model is None:
        return CostModel(), "a 7B model with CLIP ViT-L/14-336; use --model-config for another"
    origin = f"by FLOPs from {model}"
    if model.suffix not in (".yaml", ".yml"):
        return read_cost(model), origin
    import torch  # start-up time

    from anyres_vlm.checkpoints.bases import skeleton
    from anyres_vlm.config import load_config
    from anyres_vlm.train.steps import model_flops

    with torch.device("meta"):
        flops = model_flops(skeleton(load_config(model).model))
    if flops is None:
        raise UsageError(f"{model}: its language model is not like Llama, so its FLOPs cannot be counted")
    return derive_cost(flops), origin


def _read(index: Path) -> pa.Table:
    import pyarrow as pa  # start-up time
    import pyarrow.parquet as pq

    if not index.is_file():
        raise UsageError(f"{index}: no such file; expected a Parquet file with the columns tokens and tiles")
    try:
        names = pq.read_schema(index).names
        wanted = [name for name in ("tokens", "tiles", "status", "supervised") if name in names]
        table = pq.read_table(index, columns=wanted)
    except pa.ArrowException as error:
        raise DataError(f"{index}: cannot be read as Parquet: {' '.join(str(error).split())}") from None
    for name in ("tokens", "tiles"):
        if name not in wanted:
            raise DataError(
                f"{index}: no column {name!r} among {', '.join(names)}; expected integer columns tokens and tiles"
            )
        if not pa.types.is_integer(table.schema.field(name).type) or table[name].null_count:
            kind = f"{table.schema.field(name).type} with {table[name].null_count} empty values"
            raise DataError(f"{index}: column {name!r} is {kind}; expected an integer in every row")
    return table


def _check(index: Path, ids: Any, columns: dict[str, Any], capacity: int) -> None:
    """Raise for the first bad sample, naming its row in the file."""
    for name, least in (("tokens", 1), ("tiles", 0)):
        bad = (columns[name] < least).nonzero()[0]
        if len(bad):
            raise DataError(
                f"{index}: sample {ids[bad[0]]} has {columns[name][bad[0]]} {name}, expected at least {least}; "
                f"{len(bad):,} such rows: rebuild the index without them"
            )
    longest = columns["tokens"].argmax()
    if columns["tokens"][longest] > capacity:
        size = columns["tokens"][longest]
        over = int((columns["tokens"] > capacity).sum())
        raise UsageError(
            f"sample {ids[longest]} has {size:,} tokens, more than --capacity {capacity} ({over:,} such samples): "
            f"raise it to {size} or more, or index with a smaller max_length"
        )


def write_plan(made: Plan, ids: Any, ranks: int, out: Path) -> None:
    """Write one row per sample in the order of the packs; the same arguments give the same bytes."""
    import numpy as np  # start-up time
    import pyarrow as pa
    import pyarrow.parquet as pq

    sizes = np.diff(made.starts)
    packs = np.arange(made.num_packs)
    micro_steps, places = made.assign(ranks)
    columns = {"sample": ids[made.rows]}
    for name, values in (
        ("pack", packs), ("step", packs // made.packs_per_step), ("micro_step", micro_steps), ("rank", places)
    ):  # fmt: skip
        columns[name] = np.repeat(values.astype(np.int32), sizes)
    pq.write_table(pa.table(columns), out)


def _describe(figures: dict[str, Any]) -> str:
    number = {name: f"{value:,}" for name, value in figures.items() if isinstance(value, int)}
    waste, least = 1 - figures["efficiency"], 1 - figures["bound"]
    lines = [
        f"{number['samples']} samples, {number['tokens']} tokens, {number['tiles']} tiles"
        + (f" ({number['left_out']} rows left out: status not ok)" if figures["left_out"] else "")
        + (f", {number['supervised_tokens']} supervised tokens" if "supervised_tokens" in figures else ""),
        f"packs       {number['packs']} of {number['capacity']} tokens; "
        f"{number['steps']} steps of {number['packs_per_step']}",
        f"efficiency  {figures['efficiency']:.2%}; at most {figures['bound']:.2%} is possible with these lengths",
        f"waste       {waste:.2%} of all positions: {least:.2%} unavoidable, {waste - least:.2%} due to the planner",
        f"samples     {number['samples_per_step_min']} / {figures['samples_per_step_mean']:.1f} / "
        f"{number['samples_per_step_max']} per step (min, mean, max) for a batch size of {number['batch_size']}",
        f"{number['ranks']} ranks".ljust(12)
        + f"straggler factor {figures['straggler']:.4f}, utilisation {figures['utilisation']:.2%}",
        f"cost        {figures['cost_square']:.3g} per squared token, {figures['cost_tile']:.3g} per tile "
        f"({figures['cost_from']})",
        f"key         {figures['key']}",
    ]
    return "\n".join(lines + [f"advice      {line}" for line in figures["advice"]])
