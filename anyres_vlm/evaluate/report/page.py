"""The page: everything about the results of some runs as self-contained HTML, and as Markdown beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment

from anyres_vlm.durable import replacing
from anyres_vlm.evaluate.benchmark import SHORT_ANSWER
from anyres_vlm.evaluate.report import section
from anyres_vlm.evaluate.report.bootstrap import DRAWS
from anyres_vlm.evaluate.report.pictures import Pictures, png_url
from anyres_vlm.evaluate.report.published import BENCHMARKS, PUBLISHED, guide
from anyres_vlm.evaluate.report.results import Probes, Result

SHOWN = 600  # characters of a question, an answer or a truth
UNSAFE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")  # writing order among them
MARKDOWN = re.compile(r"([\\`*_\[\]|~#])")


@dataclass(frozen=True)
class Row:
    """One model in the table of all scores: a result or None for each benchmark."""

    label: str
    model: str
    cells: list[section.Scores | None]


def write_report(
    results: Sequence[Result], probes: Sequence[Probes], out: Path, pictures: Pictures, examples: int
) -> Path:
    """Write `out` and the Markdown beside it, whose path is returned; `examples` questions a list at most."""
    names = [result.benchmark for result in results]
    present = [name for name in dict.fromkeys((*BENCHMARKS, *names)) if name in names]
    sections = [
        section.make(name, [result for result in results if result.benchmark == name], pictures, examples)
        for name in present
    ]
    context: dict[str, Any] = {
        "published": PUBLISHED,
        "sources": _sources(),
        "draws": DRAWS,
        "rates": [rate.replace("_", " ") for rate in section.RATES],
        "sections": sections,
        "present": [guide(name).title for name in present],
        "published_present": [name for name in present if name in BENCHMARKS],
        "rows": _rows(results, sections),
        "names": present,
        "probes": _probed(probes),
        "png_url": png_url,
    }
    beside = out.with_suffix(".md")
    out.parent.mkdir(parents=True, exist_ok=True)
    for path, template in ((out, "report.html.j2"), (beside, "report.md.j2")):
        with replacing(path, "wb") as file:
            file.write(_render(template, context, autoescape=path is out))
    return beside


def _sources() -> list[str]:
    """Each source behind the models that it has."""
    by_source: dict[str, list[str]] = {}
    for model in PUBLISHED:
        by_source.setdefault(model.source, []).append(model.model)
    return [f"{', '.join(models)}: {source}" for source, models in by_source.items()]


def _rows(results: Sequence[Result], sections: Sequence[section.Section]) -> list[Row]:
    found = []
    for label, model in dict.fromkeys((result.label, result.model) for result in results):
        cells = [
            next((s for s in one.scores if (s.result.label, s.result.model) == (label, model)), None)
            for one in sections
        ]
        found.append(Row(label, model, cells))
    return found


def _probed(probes: Sequence[Probes]) -> list[Any]:
    if not probes:
        return []
    from anyres_vlm.evaluate.report.probing import read_probes  # start-up time: torch, behind the probes

    return [read_probes(run) for run in probes]


def _render(template: str, context: dict[str, Any], autoescape: bool) -> bytes:
    """The template's text; in Markdown everything that is put in is escaped."""
    environment = Environment(
        autoescape=autoescape,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=None if autoescape else _markdown,
    )
    environment.filters |= {"safe_text": safe_text, "asked": asked, "number": number, "signed": signed}
    text = (Path(__file__).parent / template).read_text(encoding="utf-8")
    return environment.from_string(text).render(context).encode("utf-8", "replace")


def safe_text(text: str) -> str:
    """What a page can show of any text: no control characters, none that turn the direction of writing, not endless."""
    short = text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text):,} characters)"
    return UNSAFE.sub("\ufffd", short.replace("\t", " "))


def asked(prompt: str) -> str:
    """The question in a prompt."""
    return safe_text(prompt.removeprefix("<image>\n").removesuffix(SHORT_ANSWER))


def number(value: float | None, digits: int = 1) -> str:
    """A number, or a dash for none."""
    return "-" if value is None or value != value else f"{value:,.{digits}f}"


def signed(value: float) -> str:
    """A difference with its sign."""
    return f"{value:+.1f}"


def _markdown(value: Any) -> Any:
    """Text without meaning to Markdown or HTML, on one line."""
    if not isinstance(value, str):
        return value
    return MARKDOWN.sub(r"\\\1", escape(" ".join(value.split()), quote=False))
