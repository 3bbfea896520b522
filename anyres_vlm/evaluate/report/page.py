"""The report: everything about the results of some runs as a self-contained HTML page, and as Markdown."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

from jinja2 import Environment
from PIL import Image

from anyres_vlm.data.images import open_image
from anyres_vlm.errors import DataError
from anyres_vlm.evaluate.benchmarks.base import SHORT_ANSWER, Mark
from anyres_vlm.evaluate.report.probing import read_probes
from anyres_vlm.evaluate.report.published import BENCHMARKS, PUBLISHED, caveats, guide, run_differences
from anyres_vlm.evaluate.report.results import Probes, Result
from anyres_vlm.evaluate.report.statistics import (
    DRAWS,
    Comparison,
    Interval,
    bootstrap_units,
    compare,
    draw,
    has_marks,
    interval,
    kind_ratios,
    kinds_of,
    most_different,
    score_ratios,
    shares,
    worst,
)
from anyres_vlm.files import replacing
from anyres_vlm.geometry import Tiling

NORMAL = 1.96  # standard errors of a 95% interval
RATES = ("accuracy", "precision", "recall", "f1", "yes_ratio")
MAX_KINDS = 24  # kinds of question in the table, those with most questions
MAX_TEXT = 600  # characters of a question, an answer or a reference
IMAGE_WIDTH = 900  # pixels at most
QUALITY = 75  # of JPEG
# Control characters, and those that change the direction of writing.
UNSAFE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
MARKDOWN = re.compile(r"([\\`*_\[\]|~#])")


@dataclass(frozen=True)
class Images:
    """Finds the images of questions at their recorded paths, or by file name in `folder`; draws their tiles."""

    folder: Path | None
    draw_tiling: Callable[[Image.Image, Tiling], Image.Image]

    def show(self, image: str, tiling: Tiling | None) -> tuple[str, str]:
        """Return a data URL and a remark; the URL is empty if there is no image."""
        if not image:
            return "", "the image was not recorded"
        path = Path(image)
        if self.folder is not None and (self.folder / path.name).is_file():
            path = self.folder / path.name
        try:
            opened = open_image(path)
        except (DataError, OSError, ValueError) as error:
            return "", f"no image: {error}"
        if tiling is None:
            return _jpeg_url(opened), "no tiles drawn: the result does not record the model's grid"
        return _jpeg_url(self.draw_tiling(opened, tiling)), ""


@dataclass(frozen=True)
class Scores:
    """One result with its interval. `units` counts what the bootstrap draws, which `unit_name` names.

    `reading` says which gaps are noise. `rates` are POPE's in the order of RATES, by split.
    """

    result: Result
    interval: Interval | None
    unit_name: str
    units: int
    caveats: list[str]
    reading: str
    rates: list[tuple[str, list[float | None]]]


@dataclass(frozen=True)
class Example:
    """A question with the answers of several runs, and its image as a data URL or the reason why there is none."""

    answers: list[tuple[str, Mark]]
    image: str
    remark: str


def write_report(results: Sequence[Result], probes: Sequence[Probes], out: Path, images: Images, examples: int) -> Path:
    """Write `out` and the Markdown file next to it, whose path is returned. Lists have at most `examples` questions."""
    names = [result.benchmark for result in results]
    present = [name for name in dict.fromkeys((*BENCHMARKS, *names)) if name in names]
    sections = [
        _section(name, [result for result in results if result.benchmark == name], images, examples) for name in present
    ]
    context: dict[str, Any] = {
        "published": PUBLISHED,
        "sources": _sources(),
        "draws": DRAWS,
        "rates": [rate.replace("_", " ") for rate in RATES],
        "sections": sections,
        "present": [guide(name).title for name in present],
        "published_present": [name for name in present if name in BENCHMARKS],
        "rows": _rows(results, sections),
        "names": present,
        "probes": [read_probes(run) for run in probes],
        "png_url": lambda png: _data_url("png", png),
    }
    markdown = out.with_suffix(".md")
    out.parent.mkdir(parents=True, exist_ok=True)
    for path, template in ((out, "report.html.j2"), (markdown, "report.md.j2")):
        with replacing(path, "wb") as file:
            file.write(_render(template, context, autoescape=path is out))
    return markdown


def _sources() -> list[str]:
    by_source: dict[str, list[str]] = {}
    for model in PUBLISHED:
        by_source.setdefault(model.source, []).append(model.model)
    return [f"{', '.join(models)}: {source}" for source, models in by_source.items()]


def _rows(results: Sequence[Result], sections: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row of the table of all scores for each model: a result or None for each benchmark."""
    found = []
    for label, model in dict.fromkeys((result.label, result.model) for result in results):
        cells = [
            next((s for s in one["scores"] if (s.result.label, s.result.model) == (label, model)), None)
            for one in sections
        ]
        found.append({"label": label, "model": model, "cells": cells})
    return found


def _section(name: str, results: Sequence[Result], images: Images, examples: int) -> dict[str, Any]:
    """Return what the templates show of one benchmark; every later run is compared with the first."""
    compared = [(other, compare(results[0], other)) for other in results[1:]]
    scores = [_score(result) for result in results]
    not_like_published: dict[str, list[str]] = {}  # labels of the runs, by reason
    for score in scores:
        for caveat in score.caveats:
            not_like_published.setdefault(caveat, []).append(score.result.label)
    return {
        "name": name,
        "guide": guide(name),
        "scores": scores,
        "caveats": not_like_published,
        "warnings": run_differences(results),
        "kinds": _kinds(results),
        "comparisons": [(found, _changed(found, images, examples)) for _, found in compared if found],
        "incomparable": [(results[0].label, other.label) for other, found in compared if not found],
        "failures": [(result, _failed(result, images, examples)) for result in results],
    }


def _score(result: Result) -> Scores:
    answers = list(result.answers.values())
    units, unit_name = bootstrap_units(result.answers)
    found, count = None, len(set(units))
    reading = _why_no_interval(result, answers, count)
    if not reading:
        found = interval(shares(draw(score_ratios(result.benchmark, answers), units)).mean(axis=1))
        reading = _reading(result, found, count, unit_name)
    return Scores(result, found, unit_name, count, caveats(result), reading, _rates(result))


def _why_no_interval(result: Result, answers: Sequence[Mark], count: int) -> str:
    if result.score is None:
        return "no score: F1 needs a correct yes in each split" if result.scores else "no score: no answers or no judge"
    if result.benchmark == "pope" and not has_marks(answers):
        return "no interval: F1 needs the marks.jsonl file of the result; score it again"
    return "no interval: it needs at least two images" if count < 2 else ""


def _rates(result: Result) -> list[tuple[str, list[float | None]]]:
    if result.benchmark != "pope":
        return []
    rows = {split: row for split, row in result.scores.items() if isinstance(row, dict)}
    return [(split, [_percent(row.get(rate)) for rate in RATES]) for split, row in rows.items()]


def _percent(value: Any) -> float | None:
    return 100 * value if isinstance(value, int | float) else None


def _reading(result: Result, found: Interval | None, count: int, unit_name: str) -> str:
    """Return in words which gaps are noise, and how the score compares with that of a blind model."""
    if found is None:
        most = min(100.0, 300 / count)
        return (
            f"all {unit_name} have equal points, so the bootstrap gives no interval; up to {most:.0f}% of all "
            f"{unit_name} may still differ (rule of three)"
        )
    text = f"a gap under {2**0.5 * found.margin:.1f} points to a run on other questions is noise"
    if noise := _noise(result.benchmark, found):
        text += f", and one under {noise:.1f} to a published score"
    floor = guide(result.benchmark).floor
    has_hints = result.protocol.get("ocr_tokens", "").startswith("in the prompt")
    if floor is None or has_hints:
        return text
    place = "above" if found.low > floor else "below" if found.high < floor else "not distinguishable from"
    return f"{text}; {place} {floor:g}, the score without the image"


def _noise(benchmark: str, found: Interval) -> float | None:
    """Return the smallest gap to a published score that exceeds noise, in points; None if none is published.

    Both scores are samples. The published one is treated as one of yes-or-no questions, which have the most variance.
    """
    published, sizes = PUBLISHED[0].score(benchmark), guide(benchmark).sizes
    if published is None or not sizes:
        return None
    share = published / 100
    theirs = NORMAL * 100 * (share * (1 - share) / sizes[0]) ** 0.5
    return float((found.margin**2 + theirs**2) ** 0.5)


def _kinds(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return kinds of question: the number of questions, and each run's mean points in percent."""
    tables = []
    for result in results:
        answers = list(result.answers.values())
        names = kinds_of(answers)
        sums = kind_ratios(answers, answers).sum(axis=0) if names else []
        tables.append({name: (float(hits), int(count)) for name, (hits, count) in zip(names, sums, strict=True)})
    kinds: list[dict[str, Any]] = [
        {
            "name": name,
            "questions": max(table[name][1] for table in tables if name in table),
            "means": [100 * table[name][0] / table[name][1] if name in table else None for table in tables],
        }
        for name in dict.fromkeys(name for table in tables for name in table)
    ]
    return sorted(kinds, key=lambda kind: -kind["questions"])[:MAX_KINDS]


def _changed(found: Comparison, images: Images, count: int) -> list[Example]:
    return [
        _example([(found.first, first), (found.second, second)], images)
        for _, first, second in most_different(found, count)
    ]


def _failed(result: Result, images: Images, count: int) -> list[Example]:
    return [_example([(result, answer)], images) for answer in worst(list(result.answers.values()), count)]


def _example(answers: list[tuple[Result, Mark]], images: Images) -> Example:
    """Return an example with the image that the last run that is not blind was shown."""
    result, answer = next((pair for pair in reversed(answers) if not pair[0].blind), answers[-1])
    image, remark = images.show(answer.image, result.tiling)
    if result.blind and image:
        remark = "the image of another question: the run is blind"
    return Example([(result.label, answer) for result, answer in answers], image, remark)


def _jpeg_url(image: Image.Image) -> str:
    image.thumbnail((IMAGE_WIDTH, 2 * IMAGE_WIDTH))
    content = BytesIO()
    image.save(content, "JPEG", quality=QUALITY)
    return _data_url("jpeg", content.getvalue())


def _data_url(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _render(template: str, context: dict[str, Any], autoescape: bool) -> bytes:
    """Render a template; in Markdown all inserted text is escaped."""
    environment = Environment(
        autoescape=autoescape,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=None if autoescape else _escape_markdown,
    )
    environment.filters |= {"safe_text": safe_text, "asked": _asked, "number": _number, "signed": "{:+.1f}".format}
    text = (Path(__file__).parent / template).read_text(encoding="utf-8")
    return environment.from_string(text).render(context).encode("utf-8", "replace")


def safe_text(text: str) -> str:
    """Return text that a page can show: without control characters and changes of direction, cut to MAX_TEXT."""
    short = text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}... ({len(text):,} characters)"
    return UNSAFE.sub("\ufffd", short.replace("\t", " "))


def _asked(prompt: str) -> str:
    """Return the question of a prompt."""
    return safe_text(prompt.removeprefix("<image>\n").removesuffix(SHORT_ANSWER))


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None or value != value else f"{value:,.{digits}f}"


def _escape_markdown(value: Any) -> Any:
    """Escape Markdown and HTML in a text and put it on one line."""
    if not isinstance(value, str):
        return value
    return MARKDOWN.sub(r"\\\1", escape(" ".join(value.split()), quote=False))
