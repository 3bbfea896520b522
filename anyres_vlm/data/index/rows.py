"""Compute the rows of an index from records: tile plans from image headers, token counts from the tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from anyres_vlm.data.conversation import ConversationTokenizer, Ids
from anyres_vlm.data.headers import plan_image
from anyres_vlm.data.index.table import COUNTS, FORMAT, OK, SCHEMA
from anyres_vlm.data.sources.mixture import MixtureSource
from anyres_vlm.data.sources.paths import follow_links
from anyres_vlm.data.sources.record import Source
from anyres_vlm.errors import DataError, RejectKind
from anyres_vlm.geometry import TilePlan, Tiling
from anyres_vlm.schema import IGNORE_INDEX, IMAGE_TOKEN, Record, Sample, Turn, token_repeats

BATCH = 512  # conversations tokenised at once
BATCH_CHARACTERS = 1 << 20  # limit for long ones: until the row is computed, a token takes up to 270 bytes of memory
MOVED_IMAGE = f"moved {IMAGE_TOKEN} to the front"
DROPPED_SYSTEM = "dropped the system text, as the template keeps images and answers only"
CHANGES_KEY = b"changes"  # in the metadata of a part: number of samples that were changed on reading, by kind
PROBE = (Turn("user", f"{IMAGE_TOKEN}\nquestion"), Turn("assistant", "answer")) * 2
ROW, STATUS = SCHEMA.names.index("row"), SCHEMA.names.index("status")
Place = tuple[int, str]  # row and source
Row = tuple[Any, ...]  # one value a column of the schema


@dataclass(frozen=True)
class IndexSettings:
    """The settings that determine the counts of a source."""

    conversation: ConversationTokenizer
    tiling: Tiling
    max_length: int

    @cached_property
    def words(self) -> dict[str, Any]:
        """The settings as JSON. A hash stands for the tokenizer; `dialogue` shows what the template writes."""
        tokenizer = self.conversation.tokenizer
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        content = {name: part for name, part in content.items() if name not in ("truncation", "padding")}
        content["special"] = tokenizer.special_tokens_map
        return {
            "template": self.conversation.template,
            "dialogue": self.conversation.render(PROBE),
            "tokenizer": _digest(content),
            "pinpoints": self.tiling.pinpoints,
            "layout": self.tiling.layout,
            "dialect": self.tiling.dialect,
            "tile": self.tiling.tile,
            "patch": self.tiling.patch,
            "max_length": self.max_length,
            "image_position": self.conversation.image_position,
        }

    def key(self, fingerprint: str) -> str:
        """Return the key of the index of a source with this fingerprint."""
        links = {"links": "followed"} if follow_links() else {}
        # Older indexes, built before this setting existed, are those of `as_is` and stay valid.
        words = {name: word for name, word in self.words.items() if (name, word) != ("image_position", "as_is")}
        return _digest({"format": FORMAT, "source": fingerprint, "settings": words, **links})


def index_rows(source: Source, settings: IndexSettings, start: int, stop: int) -> pa.Table:
    """Return rows `start` to `stop` (exclusive) of the index, rejects included, in the index schema."""
    rows: list[Row] = []
    planned: list[_Planned] = []
    changes: Counter[str] = Counter()
    characters = 0
    name = source.name
    for row, item in enumerate(source.records(start, stop), start=start):
        place = (row, source.origin(row) if isinstance(source, MixtureSource) else name)
        if isinstance(item, DataError):
            rows.append(_reject(item.record or str(row + 1), place, item, "malformed_record"))
        else:
            plan = _plan(item, place, settings.tiling)
            if isinstance(plan, _Planned):
                planned.append(plan)
                characters += len(plan.record.system) + sum(len(turn.text) for turn in plan.record.turns)
            else:
                rows.append(plan)
        if len(planned) == BATCH or characters >= BATCH_CHARACTERS or row == stop - 1:
            encoded = settings.conversation.encode([sample.record for sample in planned])
            for sample, result in zip(planned, encoded, strict=True):
                rows.append(_row(sample, result, settings))
                if rows[-1][STATUS] == OK:
                    changes.update(_changes(sample.record, settings.conversation))
            planned, characters = [], 0
    rows.sort(key=itemgetter(ROW))
    columns = zip(*rows, strict=True) if rows else iter([()] * len(SCHEMA))
    schema = SCHEMA.with_metadata({CHANGES_KEY: json.dumps(changes)})
    return pa.table([pa.array(values, field.type) for values, field in zip(columns, SCHEMA, strict=True)], schema)


def _plan(record: Record, place: Place, tiling: Tiling) -> _Planned | Row:
    plans: list[TilePlan] = []
    for image in record.images:
        try:
            plans.append(plan_image(image, tiling))
        except DataError as error:
            whole_file = image.path is not None and image.offset == 0 and image.length is None
            return _reject(record.id, place, error, "unreadable_image", str(image.path) if whole_file else None)
    without_images = Record(record.id, (), record.turns, system=record.system, changes=record.changes)
    return _Planned(without_images, place, tuple(plans))


class _Planned(NamedTuple):
    """A record with its tile plans, without its images, which may be bytes in memory."""

    record: Record
    place: Place
    plans: tuple[TilePlan, ...]


def _row(planned: _Planned, encoded: tuple[Ids, Ids] | DataError, settings: IndexSettings) -> Row:
    record, place, plans = planned
    if isinstance(encoded, DataError):
        return _reject(record.id, place, encoded, "inexact_labels")
    sample = Sample(record.id, *encoded, record.images, plans)
    status, reason = OK, None
    try:
        check_sample(sample, settings.max_length, settings.conversation.image_token_id)
    except DataError as error:
        status, reason = str(error.kind), str(error)
    heights, widths = [plan.image.height for plan in plans], [plan.image.width for plan in plans]
    visual, newline = sum(plan.visual_tokens for plan in plans), sum(plan.newline_tokens for plan in plans)
    length = sample.length
    counts = (sample.num_tiles, visual, newline, length - visual - newline, length, sample.num_supervised)
    return (record.id, *place, heights, widths, *counts, status, reason, None)


def check_sample(sample: Sample, max_length: int, image_token_id: int) -> None:
    """Raise `DataError` for a sample that is too long, with what a truncation would cut, or has no supervised token."""
    if sample.length > max_length:
        is_image = sample.input_ids == image_token_id
        spans = token_repeats(sample.input_ids, sample.plans, image_token_id)
        beyond = np.clip(np.cumsum(spans) - max_length, 0, spans)
        supervised = np.count_nonzero((beyond > 0) & (sample.labels != IGNORE_INDEX))
        raise DataError(
            f"record {sample.id}: {sample.length:,} tokens exceed max_length={max_length:,}: a truncation would cut "
            f"{beyond.sum():,} of them, {beyond[is_image].sum():,} visual and {supervised:,} supervised: "
            "raise max_length or lower --grid",
            kind="too_long",
        )
    if sample.num_supervised == 0:
        raise DataError(f"record {sample.id}: no supervised token", kind="unsupervised")


def _reject(name: str, place: Place, error: DataError, kind: RejectKind, image: str | None = None) -> Row:
    """Return the row of a reject, without counts; `kind` is used if the error itself has none."""
    return (name, *place, [], [], *[0] * len(COUNTS), error.kind or kind, str(error), image)


def _changes(record: Record, conversation: ConversationTokenizer) -> tuple[str, ...]:
    """Return the kinds of changes made to a record on reading and by placing its image."""
    is_moved = conversation.place_images(record.turns) is not record.turns
    drops_system = bool(record.system) and not conversation.keeps_text
    return (*record.changes, *[MOVED_IMAGE] * is_moved, *[DROPPED_SYSTEM] * drops_system)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
