"""From the raw log alone to the data set: the same log makes the same bytes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from anyres_vlm.durable import replacing
from anyres_vlm.errors import DataError
from anyres_vlm.instruct.duplicates import NearDuplicates
from anyres_vlm.instruct.job import Item
from anyres_vlm.instruct.ledger import Ledger
from anyres_vlm.instruct.objects import category_of, find_objects
from anyres_vlm.instruct.parse import Parsed, Reject
from anyres_vlm.instruct.raw_log import parse_entry
from anyres_vlm.instruct.verdict import item_of, judge
from anyres_vlm.schema import IMAGE_TOKEN, Turn

DATA, REJECTS, SUMMARY = "data.json", "rejects.jsonl", "summary.json"
FROM = {"user": "human", "assistant": "gpt"}


def build(log: Path, out: Path, ledger: Ledger) -> dict[str, Any]:
    """Write the data set in LLaVA's JSON, the rejects with their reasons, and the summary, which is returned.

    Items come in the order of their keys, which is that of no image, kind or time. Raises `DataError` for an empty log.
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
            assert reject is not None, "an item that is settled and not good was rejected"
            tally.rejects[state.kind, reject.kind] += 1
            rejects.write(json.dumps({"id": record_id(item), "kind": reject.kind, "reason": reject.reason}) + "\n")
        data.write("\n]\n")
    summary = tally.summary(ledger)
    with replacing(out / SUMMARY) as stream_out:
        stream_out.write(json.dumps(summary, indent=2) + "\n")
    return summary


def record(item: Item, parsed: Parsed) -> dict[str, Any]:
    """One entry of LLaVA's JSON, with the kind that it is of."""
    first, *rest = parsed.turns
    turns = (Turn(first.role, f"{IMAGE_TOKEN}\n{first.text}"), *rest)
    said = [{"from": FROM[turn.role], "value": turn.text} for turn in turns]
    return {"id": record_id(item), "image": item.scene.image, "kind": item.kind, "conversations": said}


def record_id(item: Item) -> str:
    """Tells the same image's conversations of several kinds apart."""
    return f"{item.scene.id}-{item.kind}"


class Tally:
    """Counts of what was built."""

    def __init__(self) -> None:
        self.accepted: Counter[str] = Counter()  # by kind
        self.rejects: Counter[tuple[str, str]] = Counter()  # by kind of data and of reject
        self.unfinished: Counter[str] = Counter()  # begun, neither good nor out of attempts
        self.objects: Counter[str] = Counter()  # conversations whose answers name the category
        self.words: dict[str, Counter[int]] = {}  # by kind: lengths of all answers of a conversation together

    def accept(self, item: Item, parsed: Parsed) -> None:
        """Count one conversation of the data set."""
        self.accepted[item.kind] += 1
        answers = " \n".join(turn.text for turn in parsed.turns if turn.role == "assistant")
        shown = {category_of(found.name) for found in item.scene.objects}
        words = [mention.word for mention in find_objects(answers)]
        self.objects.update({word.category for word in words if word.sure or word.category in shown})
        self.words.setdefault(item.kind, Counter())[len(answers.split())] += 1

    def summary(self, ledger: Ledger) -> dict[str, Any]:
        """All numbers. Accepted, rejected and unfinished make up the items: those asked for, or all that were begun."""
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
    """Words of a conversation's answers."""
    ordered = sorted(lengths.elements())
    if not ordered:
        return {}
    return {name: ordered[round(share * (len(ordered) - 1))] for name, share in QUANTILES.items()}


QUANTILES = {"least": 0.0, "median": 0.5, "p95": 0.95, "most": 1.0}
