"""Build the data set and its HTML report from the raw log alone: the same log gives the same bytes."""

from __future__ import annotations

import base64
import json
import random
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any

from jinja2 import Environment
from PIL import Image, ImageOps

from anyres_vlm.errors import DataError
from anyres_vlm.files import replacing
from anyres_vlm.instruct.annotations import stream_records
from anyres_vlm.instruct.checks import NearDuplicates, Parsed, judge
from anyres_vlm.instruct.grounding import Reject, category_of, find_objects
from anyres_vlm.instruct.job import Item
from anyres_vlm.instruct.log import Ledger, item_of, parse_entry
from anyres_vlm.schema import IMAGE_TOKEN, Turn

DATA, REJECTS, SUMMARY = "data.json", "rejects.jsonl", "summary.json"
FROM = {"user": "human", "assistant": "gpt"}


def build(log: Path, out: Path, ledger: Ledger) -> dict[str, Any]:
    """Write the data set as LLaVA JSON, the rejects with their reasons, and the summary, which is returned.

    Items are in the order of their keys, which is random but fixed. Raises `DataError` for a log without a job.
    """
    job = ledger.job
    if job is None:
        raise DataError(f"{log}: holds no job; expected the raw log of a generation")
    out.mkdir(parents=True, exist_ok=True)
    tally = Tally()
    duplicates = NearDuplicates(job.checks.max_similarity)
    with replacing(out / DATA) as data, replacing(out / REJECTS) as rejects, log.open("rb") as stream:
        data.write("[")
        for key in sorted(ledger.states):
            state = ledger.states[key]
            stream.seek(state.offset)
            entry = parse_entry(stream.readline(), f"{log} at byte {state.offset}")
            item = item_of(entry, job)
            reject = state.reject
            if state.good:
                parsed = judge(entry, item)
                if (other := duplicates.like(record_id(item), parsed.turns)) is None:
                    data.write(",\n" if tally.accepted else "\n")
                    data.write(json.dumps(record(item, parsed), ensure_ascii=False))
                    tally.accept(item, parsed)
                    continue
                reject = Reject("near_duplicate", f"says what {other} says")
            elif not state.settled(job.checks.attempts):
                tally.unfinished[state.kind] += 1
                continue
            assert reject is not None, "a settled item that is not good was rejected"
            tally.rejects[state.kind, reject.kind] += 1
            rejects.write(json.dumps({"id": record_id(item), "kind": reject.kind, "reason": reject.reason}) + "\n")
        data.write("\n]\n")
    summary = tally.summary(ledger)
    with replacing(out / SUMMARY) as stream_out:
        stream_out.write(json.dumps(summary, indent=2) + "\n")
    return summary


def record(item: Item, parsed: Parsed) -> dict[str, Any]:
    """Return an entry of LLaVA's JSON, with its kind."""
    first, *rest = parsed.turns
    turns = (Turn(first.role, f"{IMAGE_TOKEN}\n{first.text}"), *rest)
    said = [{"from": FROM[turn.role], "value": turn.text} for turn in turns]
    return {"id": record_id(item), "image": item.scene.image, "kind": item.kind, "conversations": said}


def record_id(item: Item) -> str:
    """Return an id that differs between the kinds of conversations about one image."""
    return f"{item.scene.id}-{item.kind}"


class Tally:
    """Counts for the summary."""

    def __init__(self) -> None:
        self.accepted: Counter[str] = Counter()  # by kind
        self.rejects: Counter[tuple[str, str]] = Counter()  # by kind of data and of reject
        self.unfinished: Counter[str] = Counter()  # started, neither accepted nor out of attempts
        self.objects: Counter[str] = Counter()  # conversations whose answers name the category
        self.words: dict[str, Counter[int]] = {}  # by kind: words in all answers of a conversation

    def accept(self, item: Item, parsed: Parsed) -> None:
        """Count an accepted conversation."""
        self.accepted[item.kind] += 1
        answers = " \n".join(turn.text for turn in parsed.turns if turn.role == "assistant")
        shown = {category_of(found.name) for found in item.scene.objects}
        words = [mention.word for mention in find_objects(answers)]
        self.objects.update({word.category for word in words if word.sure or word.category in shown})
        self.words.setdefault(item.kind, Counter())[len(answers.split())] += 1

    def summary(self, ledger: Ledger) -> dict[str, Any]:
        """Return all counts. Accepted, rejected and unfinished add up to the items requested, or started if more."""
        job = ledger.job
        assert job is not None
        kinds = {}
        for kind in job.prompts:
            rejects = {name: n for (of, name), n in sorted(self.rejects.items()) if of == kind}
            begun = self.accepted[kind] + sum(rejects.values()) + self.unfinished[kind]
            items = max(ledger.counts.get(kind, 0), begun)
            if not items:
                continue
            kinds[kind] = {
                "items": items,
                "accepted": self.accepted[kind],
                "rejected": sum(rejects.values()),
                "unfinished": items - begun + self.unfinished[kind],
                "rejects": rejects,
                "words": _quantiles(self.words.get(kind, Counter())),
            }
        return {
            "model": job.model,
            "items": sum(kind["items"] for kind in kinds.values()),
            "accepted": self.accepted.total(),
            "rejected": self.rejects.total(),
            "unfinished": sum(kind["unfinished"] for kind in kinds.values()),
            "kinds": kinds,
            "responses": ledger.responses,
            "repaired": ledger.repaired,
            "failed_attempts": dict(sorted(ledger.failed_attempts.items())),
            "prompt_tokens": ledger.spent.prompt_tokens,
            "completion_tokens": ledger.spent.completion_tokens,
            "cost": None if job.price is None else round(ledger.spent.cost, 6),
            "prompts": {kind: prompt.version for kind, prompt in job.prompts.items()},
            "objects": dict(sorted(self.objects.items(), key=lambda pair: (-pair[1], pair[0]))),
        }


def _quantiles(lengths: Counter[int]) -> dict[str, int]:
    """Return quantiles of the words in a conversation's answers."""
    ordered = sorted(lengths.elements())
    if not ordered:
        return {}
    return {name: ordered[round(share * (len(ordered) - 1))] for name, share in QUANTILES.items()}


QUANTILES = {"least": 0.0, "median": 0.5, "p95": 0.95, "most": 1.0}


REPORT = "report.html"
SAMPLES = 12  # of the data set
EXAMPLES = 3  # of each kind of reject
OBJECTS = 40
THUMBNAIL = 320  # pixels


def write_report(out: Path, images: Path | None) -> Path:
    """Write the HTML page to the data set's folder; without an image folder, samples have only their images' names."""
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
    """Draw samples at random with a fixed seed, without holding the data set in memory."""
    chance = random.Random(0)
    drawn: list[dict[str, Any]] = []
    for number, entry in enumerate(stream_records(data)):
        if number < SAMPLES:
            drawn.append(entry)
        elif (place := chance.randrange(number + 1)) < SAMPLES:
            drawn[place] = entry
    return drawn


def _examples(rejects: Path) -> list[dict[str, str]]:
    """Return the first few rejects of every kind, sorted by kind."""
    shown: dict[str, list[dict[str, str]]] = {}
    for reject in stream_records(rejects):
        kind = shown.setdefault(reject["kind"], [])
        if len(kind) < EXAMPLES:
            kind.append(reject)
    return [reject for kind in sorted(shown) for reject in shown[kind]]


def _picture(sample: dict[str, Any], images: Path | None) -> str | None:
    """Return a thumbnail as a data URL; None if the image cannot be read."""
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
