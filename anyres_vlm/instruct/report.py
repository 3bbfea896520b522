"""A data set as one HTML page: kinds, lengths, rejects, cost, objects, and samples beside their images."""

from __future__ import annotations

import base64
import json
import random
from io import BytesIO
from pathlib import Path
from typing import Any

from jinja2 import Environment
from PIL import Image, ImageOps

from anyres_vlm.instruct.build import DATA, REJECTS, SUMMARY
from anyres_vlm.instruct.json_stream import stream_records

REPORT = "report.html"
SAMPLES = 12  # of the data set
EXAMPLES = 3  # of each kind of reject
OBJECTS = 40
THUMBNAIL = 320  # pixels


def write_report(out: Path, images: Path | None) -> Path:
    """Write the page into the data set's folder; without an image folder, the samples have their images' names only."""
    summary = json.loads((out / SUMMARY).read_text(encoding="utf-8"))
    samples = [sample | {"picture": _picture(sample, images)} for sample in _draw(out / DATA)]
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((Path(__file__).parent / "report.html.j2").read_text(encoding="utf-8"))
    page = template.render(
        title=out.absolute().name,
        summary=summary,
        objects=list(summary["objects"].items())[:OBJECTS],
        rejects=_examples(out / REJECTS),
        samples=samples,
    )
    (out / REPORT).write_text(page, encoding="utf-8")
    return out / REPORT


def _draw(data: Path) -> list[dict[str, Any]]:
    """Samples at random, the same each time; one in memory for each that is shown."""
    chance = random.Random(0)
    drawn: list[dict[str, Any]] = []
    for number, entry in enumerate(stream_records(data)):
        if number < SAMPLES:
            drawn.append(entry)
        elif (place := chance.randrange(number + 1)) < SAMPLES:
            drawn[place] = entry
    return drawn


def _examples(rejects: Path) -> list[dict[str, str]]:
    """The first few of every kind, by kind."""
    shown: dict[str, list[dict[str, str]]] = {}
    for reject in stream_records(rejects):
        kind = shown.setdefault(reject["kind"], [])
        if len(kind) < EXAMPLES:
            kind.append(reject)
    return [reject for kind in sorted(shown) for reject in shown[kind]]


def _picture(sample: dict[str, Any], images: Path | None) -> str | None:
    """A small JPEG as a data URL; None where the image cannot be read, which the page says."""
    if images is None:
        return None
    try:
        with Image.open(images / sample["image"]) as image:
            small = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError):
        return None
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    content = BytesIO()
    small.save(content, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
