"""`anyres instruct`: generate, rebuild and mix instruction data."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from anyres_vlm.errors import Interrupted, UsageError

if TYPE_CHECKING:  # start-up time
    from anyres_vlm.instruct.budget import Estimate
    from anyres_vlm.instruct.job import Kind

instruct = typer.Typer(
    help="Make instruction data from captions and boxes through an OpenAI-compatible endpoint.\n\n"
    "Example: anyres instruct mix configs/instruct/mix.yaml --out runs/mix",
    no_args_is_help=True,
)


@instruct.command()
def generate(
    out: Path = typer.Option(..., help="Folder for the data set, raw log and report; rerun to resume."),
    count: str = typer.Option(
        ..., metavar="KIND=N,...", help="Number of images for each kind: conversation=N,detail=N,reasoning=N."
    ),
    captions: Path | None = typer.Option(None, help="COCO captions JSON."),
    instances: Path | None = typer.Option(None, help="COCO instances JSON, for boxes."),
    descriptions: Path | None = typer.Option(
        None, help="Captions and boxes as JSONL (also LLaVA's), or Visual Genome's regions JSON."
    ),
    images: Path | None = typer.Option(None, help="Image folder, for sizes missing in the files and for the report."),
    kinds: str | None = typer.Option(None, metavar="KIND,...", help="Generate only these kinds of --count."),
    boxes: bool = typer.Option(False, "--boxes", help="Include boxes in the prompts of all kinds."),
    config: Path | None = typer.Option(None, help="YAML settings; default: configs/instruct/default.yaml."),
    model: str | None = typer.Option(None, help="Model name; overrides the config."),
    base_url: str | None = typer.Option(None, help="Endpoint, such as http://localhost:8000/v1; default: OpenAI's."),
    mode: Literal["sync", "batch"] = typer.Option("sync", help="One request per response, or the Batch API."),
    prompts: Path | None = typer.Option(None, help="Folder with your own KIND.yaml prompts."),
    concurrency: int | None = typer.Option(None, min=1, help="Number of concurrent requests."),
    max_cost: float | None = typer.Option(None, min=0, help="Budget of the folder in US dollars, all runs included."),
    max_tokens: int | None = typer.Option(None, min=0, help="Budget of the folder in tokens, all runs included."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Print the cost of the remaining requests and exit."),
    as_json: bool = typer.Option(False, "--json", help="Print the summary as one JSON object."),
) -> None:
    """Generate conversations with a model, check them, and write OUT/data.json with a report.

    The key is read from OPENAI_API_KEY. Every response is on the disk before it is parsed; rerun an interrupted or
    stopped run to resume it without repeating a request.

    Example: anyres instruct generate --captions captions.json --count conversation=100 --out runs/instruct
    """
    _require_extra()
    # Start-up time: the client alone takes half a second to import.
    from anyres_vlm.config import shipped_config
    from anyres_vlm.instruct.assemble import write_report
    from anyres_vlm.instruct.generate import Order, estimate_run, generate, make_items, show_progress
    from anyres_vlm.instruct.job import load_settings

    flags = {"model": model, "base_url": base_url, "prompts": prompts, "limits.concurrency": concurrency}
    settings = load_settings(config or shipped_config("instruct/default"), flags)
    order = Order(_counts(count, kinds), out, boxes, mode, max_cost, max_tokens)
    items = make_items(_scenes(captions, instances, descriptions, images), settings, order)
    if dry_run:
        _print_estimate(estimate_run(items, order), as_json)
        return
    with show_progress() as progress:
        summary, stop = generate(items, settings, order, progress)
    page = write_report(out, images)
    _print(summary | {"stopped": stop.reason, "report": str(page)}, out, as_json)
    if stop.error is not None:
        raise stop.error
    if stop.asked:
        raise Interrupted(f"{stop.reason}; all responses are in {out}: rerun to resume")


@instruct.command()
def replay(
    log: Path = typer.Argument(..., help="Raw log: OUT/responses.jsonl of a generation."),
    out: Path = typer.Option(..., help="Folder for the data set and its report."),
    images: Path | None = typer.Option(None, help="Image folder, for the report's pictures."),
    as_json: bool = typer.Option(False, "--json", help="Print the summary as one JSON object."),
) -> None:
    """Rebuild the data set from the raw log alone, byte for byte, without a request.

    Example: anyres instruct replay runs/instruct/responses.jsonl --out runs/again
    """
    _require_extra()
    from anyres_vlm.instruct.assemble import build, write_report
    from anyres_vlm.instruct.log import read_ledger

    summary = build(log, out, read_ledger(log))
    page = write_report(out, images)
    _print(summary | {"stopped": None, "report": str(page)}, out, as_json)


@instruct.command()
def mix(
    config: Path = typer.Argument(..., help="YAML with the files of each set; see configs/instruct/mix.yaml."),
    out: Path = typer.Option(..., help="Folder for the sets as LLaVA JSON and their mixture.yaml."),
    preset: str | None = typer.Option(None, help="Volumes: 80k, 158k or 665k; default: the config's, or all data."),
) -> None:
    """Join generated data, academic question answering and text-only chat into one mixture for training.

    Example: anyres instruct mix mix.yaml --preset 665k --out runs/mix
    """
    _require_extra()
    from anyres_vlm.instruct.mix import LICENCES, MIXTURE, mix

    counts = mix(config, out, preset)
    for name, (found, drawn) in counts.items():
        print(f"{name:13} {drawn or found:>9,} of {found:,}")
    print(f"total:        {sum(drawn or found for found, drawn in counts.values()):>9,} conversations")
    print(f"mixture:      {out / MIXTURE}; licences: {out / LICENCES}")


def _require_extra() -> None:
    if missing := [name for name in ("datasketch", "ijson", "openai") if find_spec(name) is None]:
        raise UsageError(f"this needs {', '.join(missing)}: pip install 'anyres-vlm[instruct]'")


def _counts(count: str, kinds: str | None) -> dict[Kind, int]:
    from anyres_vlm.instruct.job import parse_kind

    counts: dict[Kind, int] = {}
    for part in count.split(","):
        kind, _, number = part.partition("=")
        if not number.strip().isdecimal() or int(number) == 0:
            raise UsageError(f"--count {part!r}: expected KIND=NUMBER, for example conversation=58000")
        if parse_kind(kind.strip()) in counts:
            raise UsageError(f"--count {count}: {kind.strip()} is given twice")
        counts[parse_kind(kind.strip())] = int(number)
    if kinds is None:
        return counts
    wanted = [parse_kind(kind.strip()) for kind in kinds.split(",")]
    if missing := [kind for kind in wanted if kind not in counts]:
        raise UsageError(f"--kinds {kinds}: --count gives no number of {', '.join(missing)}")
    return {kind: counts[kind] for kind in wanted}


def _scenes(captions: Path | None, instances: Path | None, descriptions: Path | None, images: Path | None) -> Any:
    from anyres_vlm.instruct.annotations import read_coco, read_descriptions

    if (captions is None) == (descriptions is None):
        raise UsageError("give either --captions (COCO, with --instances for boxes) or --descriptions")
    if captions is not None:
        return read_coco(captions, instances, images)
    if instances is not None:
        raise UsageError("--instances belongs to --captions; --descriptions has its own boxes")
    assert descriptions is not None
    return read_descriptions(descriptions, images)


def _print_estimate(estimate: Estimate, as_json: bool) -> None:
    if as_json:
        print(json.dumps(vars(estimate), indent=2))
        return
    print(f"requests: {estimate.requests:,}")
    print(f"tokens:   about {estimate.prompt_tokens:,} in, {estimate.completion_tokens:,} out (estimated)")
    if estimate.cost is None or estimate.most is None:
        print("cost:     unknown: the config has no price for this model")
    else:
        print(
            f"cost:     about ${estimate.cost:,.2f}; at most ${estimate.most:,.2f}, for long answers and all attempts"
        )


def _print(summary: dict[str, Any], out: Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps(summary, indent=2))
        return
    print(
        f"items:    {summary['items']:,} = {summary['accepted']:,} accepted + {summary['rejected']:,} rejected "
        f"+ {summary['unfinished']:,} unfinished"
    )
    for kind, numbers in summary["kinds"].items():
        reasons = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in numbers["rejects"].items())
        print(f"  {kind}: {numbers['accepted']:,} of {numbers['items']:,}" + (f" ({reasons})" if reasons else ""))
    cost = "unknown: the config has no price for this model" if summary["cost"] is None else f"${summary['cost']:,.4f}"
    print(f"asked:    {summary['responses']:,} responses, {summary['repaired']:,} repaired")
    print(f"tokens:   {summary['prompt_tokens']:,} in, {summary['completion_tokens']:,} out; cost {cost}")
    if summary["stopped"]:
        print(f"stopped:  {summary['stopped']}")
    if summary["unfinished"] and not summary["stopped"]:
        print("unfinished items got no answer or have attempts left: rerun to resume")
    print(f"data:     {out / 'data.json'}")
    print(f"report:   {summary['report']}")
