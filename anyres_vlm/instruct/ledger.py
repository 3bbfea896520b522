"""What a raw log holds: of each item its attempts, what came of them and what they cost."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anyres_vlm.errors import DataError
from anyres_vlm.instruct.budget import Spent
from anyres_vlm.instruct.job import Item, Job
from anyres_vlm.instruct.parse import Reject
from anyres_vlm.instruct.prompts import Kind
from anyres_vlm.instruct.raw_log import read_log
from anyres_vlm.instruct.verdict import add_spent, item_of, judge


@dataclass(slots=True)
class State:
    """Of one item. `offset` is of its first good response or, without one, of its last."""

    kind: Kind
    attempts: set[int] = field(default_factory=set)
    offset: int = -1
    good: bool = False
    reject: Reject | None = None

    def settled(self, attempts: int) -> bool:
        """Whether the model is not asked again."""
        final = self.reject is not None and self.reject.kind == "refused_request"
        return self.good or final or len(self.attempts) >= attempts


@dataclass
class Ledger:
    """Built entry by entry, from a log or while it is written."""

    job: Job | None = None
    counts: dict[Kind, int] = field(default_factory=dict)
    states: dict[str, State] = field(default_factory=dict)
    spent: Spent = field(default_factory=Spent)
    responses: int = 0
    repaired: int = 0
    failed_attempts: Counter[str] = field(default_factory=Counter)  # by reason, those that a later one mended included
    batches: dict[str, dict[str, Any]] = field(default_factory=dict)  # by name: its latest entry

    @property
    def under_way(self) -> bool:
        """Whether a batch was submitted, or may have been, and not collected."""
        return any(entry["state"] != "collected" for entry in self.batches.values())

    def settled(self, key: str, attempts: int) -> bool:
        """Whether the model is not asked about an item again."""
        return key in self.states and self.states[key].settled(attempts)

    def made(self, key: str) -> set[int]:
        """The attempts of an item that were answered."""
        return self.states[key].attempts if key in self.states else set()

    def add(self, entry: dict[str, Any], item: Item | None = None, offset: int = -1) -> int:
        """Take in one entry. Returns the tokens of a response, else 0.

        Raises `DataError` for a response before the job, or one that was logged before.
        """
        if "job" in entry:
            self.job = Job.from_json(entry["job"])
        elif "count" in entry:
            self.counts |= {kind: max(count, self.counts.get(kind, 0)) for kind, count in entry["count"].items()}
        elif "batch_name" in entry:
            self.batches[entry["batch_name"]] = entry
        else:
            if self.job is None:
                raise DataError("the raw log begins with no job: its first line is missing")
            return self._add_response(entry, item or item_of(entry, self.job), offset)
        return 0

    def _add_response(self, entry: dict[str, Any], item: Item, offset: int) -> int:
        state = self.states.setdefault(entry["key"], State(item.kind))
        if entry["attempt"] in state.attempts:
            raise DataError(f"the raw log has attempt {entry['attempt']} of {entry['key'][:12]} twice")
        state.attempts.add(entry["attempt"])
        self.responses += 1
        tokens = add_spent(self.spent, entry, item)
        if state.good:
            return tokens
        state.offset = offset
        try:
            parsed = judge(entry, item)
        except Reject as reject:
            state.reject = reject.with_traceback(None)
            self.failed_attempts[reject.kind] += 1
        else:
            state.good, state.reject = True, None
            self.repaired += parsed.repaired
        return tokens


def read_ledger(path: Path) -> Ledger:
    """Everything in a raw log. Raises `DataError` for one that is missing or broken."""
    ledger = Ledger()
    for offset, entry in read_log(path):
        try:
            ledger.add(entry, offset=offset)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path} at byte {offset}: {error if isinstance(error, DataError) else repr(error)}"
            ) from None
    return ledger
