"""A whole run in minutes, before it costs anything: what would stop it is found on a small replica of its models.

The checks look at the real files; the run itself is `anyres train` in processes of its own, with the configuration's
templates, lengths, presets and precision, on shrunk models and a selection of the real records. A check that fails
does not keep the others from being tried, except those that need what it could not make.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from transformers import AutoConfig, PreTrainedTokenizerFast

from anyres_vlm.checkpoints.bases import build_model, skeleton
from anyres_vlm.checkpoints.describe import describe_model
from anyres_vlm.checkpoints.folders import parsing
from anyres_vlm.config import CheckpointConfig, DataConfig, ModelConfig, RunConfig, StageName
from anyres_vlm.data.conversation import ConversationTokenizer
from anyres_vlm.data.index.rows import IndexSettings
from anyres_vlm.data.index.table import OK
from anyres_vlm.data.packing.plan import round_packs
from anyres_vlm.data.sources import Source, open_source
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.geometry import Tiling
from anyres_vlm.preflight.doctor import require_reachable
from anyres_vlm.preflight.machine import Finding, gigabytes, judge
from anyres_vlm.preflight.replica import choose, look, replicate, small_files, weight_files, write_records
from anyres_vlm.preflight.trial import SAVE_EVERY, STAGES, STEPS, NotTried, Trial
from anyres_vlm.schema import Record, Turn
from anyres_vlm.train.engine.deepspeed_settings import find_preset, resolve_deepspeed
from anyres_vlm.train.engine.engine import require_trackers
from anyres_vlm.train.recipe import trained_rates

LOGITS = 1 << 28  # of a pack at most on a CPU, where they take most of the time: tokens times vocabulary
SHARE_FILLED = 0.8  # of the packs' room is for the chosen records: packs do not fill to the end
RENDERED = 48  # samples where there is no data


@dataclass(frozen=True)
class Tried:
    """One line of the table: what a step found and how long it took."""

    finding: Finding
    seconds: float


@dataclass(frozen=True)
class Chosen:
    """A stage's records for the rehearsal: a file of them, and one with its images as it was read."""

    path: Path
    images: Path
    example: Record


class Rehearsal:
    """What one rehearsal has made so far; `steps` are its order."""

    def __init__(self, config: RunConfig, output: Path, work: Path) -> None:
        self.config, self.output, self.work = config, output, work
        self.described: tuple[ModelConfig, Tiling, PreTrainedTokenizerFast] | None = None
        self.model: ModelConfig | CheckpointConfig | None = None
        self.chosen: dict[StageName, Chosen] = {}
        self.broken_presets: set[StageName] = set()
        self.trial: Trial | None = None
        has_preset = any(config.stage(stage).deepspeed for stage in STAGES)
        self.ranks = torch.cuda.device_count() or (2 if has_preset else 1)
        self.steps: dict[str, Callable[[], Iterator[Finding]]] = {
            "installation": self._check_installation,
            "output": self._check_output,
            "deepspeed": self._check_deepspeed,
            "bases": self._check_bases,
            "stage1 data": lambda: self._check_data("stage1"),
            "stage2 data": lambda: self._check_data("stage2"),
            "replica": self._make_replica,
            "train": lambda: self._tried().train_and_kill(),
            "resume": lambda: self._tried().resume(),
            "answers": lambda: self._tried().compare_answers(),
            "export": lambda: self._tried().export(),
            "model card": lambda: self._tried().read_card(),
        }

    def run(self) -> Iterator[Tried]:
        """Every step's findings in order, each as soon as it is there."""
        for name, step in self.steps.items():
            began = time.monotonic()
            for finding in _caught(name, step):
                yield Tried(finding, time.monotonic() - began)
                began = time.monotonic()

    def _check_installation(self) -> Iterator[Finding]:
        require_trackers(self.config.trackers)
        yield Finding("installation", "ok", ", ".join(("tensorboard", *self.config.trackers)))
        rendered = any(self.config.stage(stage).data.rendered for stage in STAGES)
        if rendered and find_spec("matplotlib") is None:
            words = "matplotlib is missing, its fonts draw the rendered data"
            yield Finding("installation", "fail", words, "pip install 'anyres-vlm[demo]'")

    def _check_output(self) -> Iterator[Finding]:
        """Writable, and as a folder: a file in its place is found, too."""
        place = self.output.absolute()
        while not place.exists():
            place = place.parent
        try:
            with tempfile.TemporaryDirectory(dir=place, prefix=".anyres-rehearse-") as folder:
                (Path(folder) / "new").write_bytes(os.urandom(1 << 20))
                (Path(folder) / "new").replace(Path(folder) / "written")
        except OSError as error:
            remedy = "choose another --output, or make it writable"
            yield Finding("output", "fail", f"{self.output}: {place}: {error.strerror}", remedy)
            return
        yield Finding("output", "ok", f"{place} can be written")

    def _check_deepspeed(self) -> Iterator[Finding]:
        presets = {stage: preset for stage in STAGES if (preset := self.config.stage(stage).deepspeed)}
        if not presets:
            yield Finding("deepspeed", "ok", "no stage names a preset")
            return
        if find_spec("deepspeed") is None:
            self.broken_presets |= presets.keys()
            words = f"not installed, the config names {', '.join(dict.fromkeys(presets.values()))}"
            yield Finding("deepspeed", "fail", words, "pip install 'anyres-vlm[deepspeed]'")
            return
        for stage, preset in presets.items():
            try:
                settings = resolve_deepspeed(
                    find_preset(preset), self.config, stage, ranks=0, has_cuda=torch.cuda.is_available()
                )
            except UsageError as error:
                self.broken_presets.add(stage)
                yield Finding("deepspeed", "fail", f"{stage}: {error}")
                continue
            for warning in settings.warnings:
                yield Finding("deepspeed", "warn", f"{stage}: {warning}")
            yield Finding("deepspeed", "ok", f"{stage}: {preset} agrees with the run")

    def _check_bases(self) -> Iterator[Finding]:
        """The real files: there, complete, of a supported kind, and with room on the disk for their checkpoints."""
        model = self.config.model
        require_reachable(model)
        if isinstance(model, CheckpointConfig):
            names = {"checkpoint": model.checkpoint}
        else:
            names = {"llm": model.llm} | ({"encoder": model.encoder.name} if model.encoder.kind == "clip" else {})
        is_whole = True
        for part, name in names.items():
            for finding in _caught("bases", partial(_check_files, name)):
                is_whole &= finding.level != "fail"
                yield Finding(finding.check, finding.level, f"{part}: {finding.found}", finding.remedy)
        if not is_whole:
            return
        yield from self._check_described(_local(model))
        yield from self._check_disk(_local(model))

    def _check_described(self, model: ModelConfig | CheckpointConfig) -> Iterator[Finding]:
        """Tokenizer, templates and geometry; sets `described`."""
        with parsing(Path(_first_name(model)), "its tokenizer or configuration"):
            described = describe_model(model)
        chosen, tiling, tokenizer = described
        if isinstance(model, ModelConfig):
            rows = _embedding_rows(model)
            if tokenizer.vocab_size > rows:
                words = f"the tokenizer has {tokenizer.vocab_size:,} tokens, the embedding {rows:,} rows"
                yield Finding("tokenizer", "fail", words, "the tokenizer belongs to another model: fetch the whole one")
        good = True
        for template in dict.fromkeys((chosen.template, *(self.config.stage(s).template for s in STAGES))):
            try:
                conversation = ConversationTokenizer(template or chosen.template, tokenizer)
                _ = conversation.stop_ids
                conversation.render([Turn("user", "a"), Turn("assistant", "b")])
            except (UsageError, DataError) as error:
                good = False
                yield Finding("template", "fail", str(error))
        words = f"{len(tokenizer):,} tokens, template {chosen.template}, tiles of {tiling.tile} px, grid {chosen.grid}"
        yield Finding("tokenizer", "ok", words)
        if good:
            self.described = described

    def _check_disk(self, model: ModelConfig | CheckpointConfig) -> Iterator[Finding]:
        """Room for what both stages keep, from the real model's number of parameters."""
        with torch.device("meta"):
            real = skeleton(model)
        sizes: dict[str, int] = {}
        for name, parameter in real.named_parameters():
            part = name.partition(".")[0]
            sizes[part] = sizes.get(part, 0) + parameter.numel()
        one, two = (_checkpoint_bytes(self.config, stage, sizes) for stage in STAGES)
        kept = self.config.keep_checkpoints
        finished = 4 * sum(sizes.values())
        # The new checkpoint is written before the oldest goes, the model after the last of them.
        need = kept * one + finished + max((kept + 1) * two, kept * two + finished)
        place = next(path for path in (self.output.absolute(), *self.output.absolute().parents) if path.is_dir())
        have = sum(file.stat().st_size for file in self.output.rglob("*") if file.is_file())
        free = shutil.disk_usage(place).free + have
        words = f"{sum(sizes.values()) / 1e9:.2f} B parameters: {kept} checkpoints a stage and two models take about "
        words += f"{gigabytes(need)}, {gigabytes(free)} are free at {place}"
        yield judge("disk", need <= free, words, "make room, lower keep_checkpoints, or choose another --output")

    def _check_data(self, stage: StageName) -> Iterator[Finding]:
        """Index records of the real source, judge its rejects and lengths, choose some; sets `chosen`."""
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
            yield Finding(check, "warn", "records are rendered for the rehearsal instead")
            return
        if self.described is None:
            raise NotTried("it needs the tokenizer and its templates")
        model, tiling, tokenizer = self.described
        conversation = ConversationTokenizer(settings.template or model.template, tokenizer, data.image_position)
        yield from self._judge(stage, source, IndexSettings(conversation, tiling, settings.max_length))

    def _judge(self, stage: StageName, source: Source, index: IndexSettings) -> Iterator[Finding]:
        check, settings = f"{stage} data", self.config.stage(stage)
        table = look(source, index)
        status = np.array(table["status"].to_pylist())
        tokens, bad, limit = table["tokens"].to_numpy(), status != OK, settings.data.max_bad_fraction
        seen = f"{len(status):,} of {len(source):,} records looked at"
        kinds = ", ".join(
            f"{kind} {count:,}" for kind, count in zip(*np.unique(status[bad], return_counts=True), strict=True)
        )
        words = f"{settings.data.path}: {seen}, {bad.sum():,} rejects" + (f" ({kinds})" if kinds else "")
        if bad.sum() > limit * len(status) or bad.all():
            first = next(reason for reason in table["reason"].to_pylist() if reason is not None)
            words += f", the limit is max_bad_fraction={limit:g}; the first: {first}"
            yield Finding(check, "fail", words, f"fix them (anyres index {settings.data.path} lists all) or raise it")
        if bad.all():
            return
        good = tokens[~bad]
        packs = settings.packs_per_step or round_packs(settings.batch_size * good.mean() / settings.capacity)
        words += f"; longest {good.max():,} tokens of max_length {settings.max_length:,}"
        words += f"; about {packs:,} packs a step: more ranks than that would idle"
        if bad.sum() <= limit * len(status):
            yield Finding(check, "ok", words)
        room = int(SHARE_FILLED * STEPS * self.ranks * self._capacity(stage))
        rows = choose(table, room, self.config.seed)
        path = write_records(source, rows, self.work / f"{stage}-records")
        with_images = table.filter(pc.and_(pc.equal(table["status"], OK), pc.greater(table["tiles"], 0)))
        example = source.record(int((with_images if len(with_images) else table)["row"][0].as_py()))
        self.chosen[stage] = Chosen(path, path.parent / "images", example)
        yield Finding(
            check, "ok", f"{len(rows)} records chosen: the extremes, each source and kind of reject, random ones"
        )

    def _make_replica(self) -> Iterator[Finding]:
        """Shrink the bases, put them together and save the result, as every run does at its end."""
        if self.described is None:
            raise NotTried("it needs the bases and their templates")
        model = replicate(_local(self.config.model), self.work / "bases", self.config.seed)
        built, tokenizer = build_model(model, self.config.seed)
        count = sum(parameter.numel() for parameter in built.parameters())
        yield Finding("replica", "ok", f"{count / 1e6:.1f} M parameters, {len(tokenizer):,} tokens")
        self.model = model

    def _tried(self) -> Trial:
        """The run on the replica, made at its first use."""
        if self.model is None:
            raise NotTried("it needs the replica")
        if self.trial is None:
            chosen = self.chosen.get("stage2")
            example = None if chosen is None else chosen.example
            self.trial = Trial(self._derived(self.model), self.work, self.ranks, example)
        return self.trial

    def _derived(self, model: ModelConfig | CheckpointConfig) -> RunConfig:
        """The run's configuration on the replica; everything that decides how a sample is treated stays."""
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
        """The pack's own on a GPU; on a CPU what keeps a step within seconds, and still holds the longest sample."""
        settings = self.config.stage(stage)
        if torch.cuda.is_available() or self.described is None:
            return settings.capacity
        return max(settings.max_length, min(settings.capacity, LOGITS // len(self.described[2])))

    def _data(self, stage: StageName) -> DataConfig:
        data = self.config.stage(stage).data
        if (chosen := self.chosen.get(stage)) is not None:
            changes: dict[str, Any] = {"path": chosen.path, "images": chosen.images}
        else:
            purpose = "captions" if stage == "stage1" else "instructions"
            changes = {"path": None, "images": None, "rendered": data.rendered or purpose, "samples": RENDERED}
        return data.model_copy(update={**changes, "index": None, "max_bad_fraction": 0.9})


def on_data(config: RunConfig, path: Path | None, images: Path | None) -> RunConfig:
    """The configuration with other records in both stages; None leaves each stage's own."""
    if path is None:
        return config
    other = {"path": path.expanduser(), "images": None if images is None else images.expanduser()}
    other |= {"rendered": None, "samples": None, "kinds": None, "index": None}
    changes: dict[str, Any] = {}
    for name in STAGES:
        stage = config.stage(name)
        changes[name] = stage.model_copy(update={"data": stage.data.model_copy(update=other)})
    return config.model_copy(update=changes)


def _caught(name: str, step: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """The findings of a step; one that breaks is a finding itself."""
    try:
        yield from step()
    except NotTried as reason:
        yield Finding(name, "warn", f"not tried: {reason}")
    except Exception as error:  # whatever libraries raise over someone's files would also end the real run
        yield Finding(name, "fail", " ".join(str(error).split()) or type(error).__name__)


def _check_files(name: str) -> Iterator[Finding]:
    folder = small_files(name)
    weights = weight_files(name)
    yield Finding("bases", "ok", f"{folder}, {len(weights)} files of weights ({weights[0]})")


def _local(model: ModelConfig | CheckpointConfig) -> ModelConfig | CheckpointConfig:
    """The model with the folders of its files in place of hub ids, of which libraries would fetch the weights."""
    if isinstance(model, CheckpointConfig):
        return model.model_copy(update={"checkpoint": str(small_files(model.checkpoint))})
    changes: dict[str, Any] = {"llm": str(small_files(model.llm))}
    if model.encoder.kind == "clip":
        named = {"name": str(small_files(model.encoder.name))}
        changes["encoder"] = model.encoder.model_copy(update=named)
    return model.model_copy(update=changes)


def _first_name(model: ModelConfig | CheckpointConfig) -> str:
    return model.checkpoint if isinstance(model, CheckpointConfig) else model.llm


def _embedding_rows(model: ModelConfig) -> int:
    config: Any = AutoConfig.from_pretrained(model.llm, trust_remote_code=False)
    return int(getattr(config, "text_config", config).vocab_size)


def _checkpoint_bytes(config: RunConfig, stage: StageName, sizes: dict[str, int]) -> int:
    """Bytes of a checkpoint: trained weights and their two moments in fp32."""
    trained = trained_rates(config, stage)
    return sum(12 * size for part, size in sizes.items() if part in trained)
