"""Rehearsal of a whole run in minutes: find what would stop it before it costs anything.

The checks read the real files. The run itself is `anyres train` in separate processes, with the configuration's
templates, lengths, presets and precision, but with shrunk models and a selection of the real records. After a failed
check the others still run, except those that need its result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from transformers import PreTrainedTokenizerFast

from anyres_vlm.checkpoints.bases import build_model
from anyres_vlm.checkpoints.describe import describe_bases
from anyres_vlm.config import STAGES, CheckpointConfig, DataConfig, ModelConfig, RunConfig, StageName
from anyres_vlm.data.conversation import ConversationTokenizer
from anyres_vlm.data.index.rows import IndexSettings
from anyres_vlm.data.index.table import OK
from anyres_vlm.data.packing.plan import round_packs
from anyres_vlm.data.sources import Source, open_source
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.geometry import Tiling
from anyres_vlm.preflight.doctor import (
    Case,
    base_names,
    check_disk,
    check_output,
    check_preset,
    check_trackers,
    require_reachable,
)
from anyres_vlm.preflight.machine import Finding
from anyres_vlm.preflight.replica import choose, index_part, replicate, small_files, weight_files, write_records
from anyres_vlm.preflight.trial import SAVE_EVERY, STEPS, Skipped, Trial
from anyres_vlm.schema import Record, Turn

MAX_LOGITS = 1 << 28  # tokens times vocabulary of a pack on a CPU, where logits take most of the time
FILL = 0.8  # of the packs' tokens is planned for the chosen records, as packs are never completely full
RENDERED = 48  # samples of a stage without data


@dataclass(frozen=True)
class Tried:
    """A finding and the seconds that it took."""

    finding: Finding
    seconds: float


@dataclass(frozen=True)
class Chosen:
    """A stage's records for the rehearsal: their file, and one record, with images if there is any."""

    path: Path
    example: Record


class Rehearsal:
    """One rehearsal: `steps` in order, and what they have produced so far."""

    def __init__(self, config: RunConfig, output: Path, work: Path) -> None:
        self.config, self.work, self.case = config, work, Case(config, output)
        self.described: tuple[ModelConfig, Tiling, PreTrainedTokenizerFast] | None = None
        self.model: ModelConfig | CheckpointConfig | None = None
        self.chosen: dict[StageName, Chosen] = {}
        self.broken_presets: set[StageName] = set()
        self.trial: Trial | None = None
        has_preset = any(config.stage(stage).deepspeed for stage in STAGES)
        self.ranks = torch.cuda.device_count() or (2 if has_preset else 1)
        self.steps: dict[str, Callable[[], Iterator[Finding]]] = {
            "installation": lambda: check_trackers(self.case),
            "output": lambda: check_output(self.case),
            "deepspeed": self._check_presets,
            "bases": self._check_bases,
            "stage1 data": lambda: self._check_data("stage1"),
            "stage2 data": lambda: self._check_data("stage2"),
            "replica": self._make_replica,
            "train": lambda: self._require_trial().train_and_kill(),
            "resume": lambda: self._require_trial().resume(),
            "answers": lambda: self._require_trial().compare_answers(),
            "export": lambda: self._require_trial().export(),
            "model card": lambda: self._require_trial().read_card(),
        }

    def run(self) -> Iterator[Tried]:
        """Run all steps in order and yield each finding as soon as it is known."""
        for name, step in self.steps.items():
            began = time.monotonic()
            for finding in _catch(name, step):
                yield Tried(finding, time.monotonic() - began)
                began = time.monotonic()

    def _check_presets(self) -> Iterator[Finding]:
        """Check each stage's DeepSpeed preset; the trial runs without the broken ones."""
        if not any(self.config.stage(stage).deepspeed for stage in STAGES):
            yield Finding("deepspeed", "ok", "no stage sets a preset")
        for stage in STAGES:
            for finding in check_preset(self.case, stage):
                if finding.level == "fail":
                    self.broken_presets.add(stage)
                yield finding

    def _check_bases(self) -> Iterator[Finding]:
        """Check that the real files are complete and of a supported kind and that their checkpoints fit on the disk."""
        require_reachable(self.config.model)
        is_complete = True
        for part, name in base_names(self.config.model).items():
            for finding in _catch("bases", partial(_check_files, name)):
                is_complete &= finding.level != "fail"
                yield Finding(finding.check, finding.level, f"{part}: {finding.found}", finding.remedy)
        if not is_complete:
            return
        local = Case(self.config.model_copy(update={"model": _local(self.config.model)}), self.case.output)
        yield from self._check_templates(local)
        yield from check_disk(local)

    def _check_templates(self, local: Case) -> Iterator[Finding]:
        """Check the tokenizer and each stage's template; sets `described` if all of them work."""
        if local.described is None:
            raise DataError(local.faults[0])
        chosen, tiling, tokenizer = local.described
        if isinstance(local.config.model, ModelConfig):
            rows: int = describe_bases(local.config.model).text_config.vocab_size
            if tokenizer.vocab_size > rows:
                words = f"the tokenizer has {tokenizer.vocab_size:,} tokens, the embedding {rows:,} rows"
                remedy = "the tokenizer belongs to another model: download the complete model again"
                yield Finding("tokenizer", "fail", words, remedy)
        is_good = True
        for template in dict.fromkeys((chosen.template, *(self.config.stage(s).template for s in STAGES))):
            try:
                conversation = ConversationTokenizer(template or chosen.template, tokenizer)
                _ = conversation.stop_ids
                conversation.render([Turn("user", "a"), Turn("assistant", "b")])
            except (UsageError, DataError) as error:
                is_good = False
                yield Finding("template", "fail", str(error))
        words = f"{len(tokenizer):,} tokens, template {chosen.template}, tiles of {tiling.tile} px, grid {chosen.grid}"
        yield Finding("tokenizer", "ok", words)
        if is_good:
            self.described = local.described

    def _check_data(self, stage: StageName) -> Iterator[Finding]:
        """Index records of the real source, check rejects and lengths, and choose some for the trial; sets `chosen`."""
        check, settings = f"{stage} data", self.config.stage(stage)
        data = settings.data
        if data.path is None:
            yield Finding(check, "ok", f"{data.samples:,} rendered {data.rendered}, {RENDERED} for the rehearsal")
            return
        try:
            source = open_source(data.path, data.images)
            if len(source) == 0:
                raise DataError(f"{data.path}: contains no records")
        except (DataError, UsageError, OSError) as error:
            yield Finding(check, "fail", str(error), f"set {stage}.data.path and {stage}.data.images, or give --data")
            yield Finding(check, "warn", "the rehearsal uses rendered records instead")
            return
        if self.described is None:
            raise Skipped("needs the tokenizer and its templates")
        model, tiling, tokenizer = self.described
        conversation = ConversationTokenizer(settings.template or model.template, tokenizer, data.image_position)
        yield from self._check_records(stage, source, IndexSettings(conversation, tiling, settings.max_length))

    def _check_records(self, stage: StageName, source: Source, index: IndexSettings) -> Iterator[Finding]:
        check, settings = f"{stage} data", self.config.stage(stage)
        table = index_part(source, index)
        status = np.array(table["status"].to_pylist())
        tokens, bad, limit = table["tokens"].to_numpy(), status != OK, settings.data.max_bad_fraction
        seen = f"{len(status):,} of {len(source):,} records inspected"
        kinds = ", ".join(
            f"{kind} {count:,}" for kind, count in zip(*np.unique(status[bad], return_counts=True), strict=True)
        )
        words = f"{settings.data.path}: {seen}, {bad.sum():,} rejects" + (f" ({kinds})" if kinds else "")
        if bad.sum() > limit * len(status) or bad.all():
            first = next(reason for reason in table["reason"].to_pylist() if reason is not None)
            words += f", the limit is max_bad_fraction={limit:g}; first error: {first}"
            remedy = f"fix them (anyres index {settings.data.path} lists all) or raise the limit"
            yield Finding(check, "fail", words, remedy)
        if bad.all():
            return
        good = tokens[~bad]
        packs = settings.packs_per_step or round_packs(settings.batch_size * good.mean() / settings.capacity)
        words += f"; longest has {good.max():,} tokens, max_length is {settings.max_length:,}"
        words += f"; about {packs:,} packs per step, which is the largest useful number of ranks"
        if bad.sum() <= limit * len(status):
            yield Finding(check, "ok", words)
        budget = int(FILL * STEPS * self.ranks * self._capacity(stage))
        rows = choose(table, budget, self.config.seed)
        path = write_records(source, rows, self.work / f"{stage}-records")
        with_images = table.filter(pc.and_(pc.equal(table["status"], OK), pc.greater(table["tiles"], 0)))
        example = source.record(int((with_images if len(with_images) else table)["row"][0].as_py()))
        self.chosen[stage] = Chosen(path, example)
        words = f"{len(rows)} records chosen: the longest, some of each source and kind of reject, and random ones"
        yield Finding(check, "ok", words)

    def _make_replica(self) -> Iterator[Finding]:
        """Shrink the base models and build the model from them."""
        if self.described is None:
            raise Skipped("needs the base models and their templates")
        model = replicate(_local(self.config.model), self.work / "bases", self.config.seed)
        built, tokenizer = build_model(model, self.config.seed)
        count = sum(parameter.numel() for parameter in built.parameters())
        yield Finding("replica", "ok", f"{count / 1e6:.1f} M parameters, {len(tokenizer):,} tokens")
        self.model = model

    def _require_trial(self) -> Trial:
        """Return the trial run on the replica, created on first use. Raises `Skipped` without a replica."""
        if self.model is None:
            raise Skipped("needs the replica")
        if self.trial is None:
            chosen = self.chosen.get("stage2")
            example = None if chosen is None else chosen.example
            self.trial = Trial(self._trial_config(self.model), self.work, self.ranks, example)
        return self.trial

    def _trial_config(self, model: ModelConfig | CheckpointConfig) -> RunConfig:
        """Return the run's configuration for the replica; all that affects how a sample is processed is unchanged."""
        stages: dict[str, Any] = {}
        for stage in STAGES:
            settings = self.config.stage(stage)
            changes: dict[str, Any] = {"data": self._data(stage), "packs_per_step": self.ranks, "epochs": STEPS}
            changes["capacity"] = self._capacity(stage)
            if stage in self.broken_presets:
                changes["deepspeed"] = None
            stages[stage] = settings.model_copy(update=changes)
        changes = {**stages, "model": model, "trackers": (), "workers": min(self.config.workers, 1)}
        changes |= {"save_every": SAVE_EVERY, "save_minutes": None, "rank_timeout_minutes": 10.0}
        if self.config.cache_features is not None:
            changes["cache_features"] = self.config.cache_features.model_copy(update={"folder": self.work / "features"})
        return self.config.model_copy(update=changes)

    def _capacity(self, stage: StageName) -> int:
        """Return the capacity for the trial, reduced on a CPU to keep steps short, but to no less than `max_length`."""
        settings = self.config.stage(stage)
        if torch.cuda.is_available() or self.described is None:
            return settings.capacity
        return max(settings.max_length, min(settings.capacity, MAX_LOGITS // len(self.described[2])))

    def _data(self, stage: StageName) -> DataConfig:
        data = self.config.stage(stage).data
        if (chosen := self.chosen.get(stage)) is not None:
            changes: dict[str, Any] = {"path": chosen.path, "images": chosen.path.parent / "images"}
        else:
            purpose = "captions" if stage == "stage1" else "instructions"
            changes = {"path": None, "images": None, "rendered": data.rendered or purpose, "samples": RENDERED}
        return data.model_copy(update={**changes, "index": None, "max_bad_fraction": 0.9})


def _catch(name: str, step: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """Yield the findings of a step; a step that raises is itself a finding."""
    try:
        yield from step()
    except Skipped as reason:
        yield Finding(name, "warn", f"skipped: {reason}")
    except Exception as error:  # libraries raise anything on broken files, and it would also end the real run
        yield Finding(name, "fail", " ".join(str(error).split()) or type(error).__name__)


def _check_files(name: str) -> Iterator[Finding]:
    folder = small_files(name)
    weights = weight_files(name)
    yield Finding("bases", "ok", f"{folder}, {len(weights)} weight files ({weights[0]})")


def _local(model: ModelConfig | CheckpointConfig) -> ModelConfig | CheckpointConfig:
    """Return the model with hub ids replaced by folders without weights, so that no library downloads the weights."""
    if isinstance(model, CheckpointConfig):
        return model.model_copy(update={"checkpoint": str(small_files(model.checkpoint))})
    changes: dict[str, Any] = {"llm": str(small_files(model.llm))}
    if model.encoder.kind == "clip":
        named = {"name": str(small_files(model.encoder.name))}
        changes["encoder"] = model.encoder.model_copy(update=named)
    return model.model_copy(update=changes)
