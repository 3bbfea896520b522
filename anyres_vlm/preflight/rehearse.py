"""A whole run in minutes, before it costs anything: what would stop it is found on a small replica of its models.

The checks look at the real files; the run itself is `anyres train` in processes of its own, with the configuration's
templates, lengths, presets and precision, on shrunk models and a selection of the real records. A check that fails
does not keep the others from being tried, except those that need what it could not make.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow.compute as pc
import torch
import yaml
from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor, PreTrainedTokenizerFast

from anyres_vlm.config import CheckpointConfig, DataConfig, ModelConfig, RunConfig, StageName
from anyres_vlm.data.conversation import ConversationTokenizer
from anyres_vlm.data.images import open_image
from anyres_vlm.data.index.rows import IndexSettings
from anyres_vlm.data.index.table import OK
from anyres_vlm.data.packing.plan import round_packs
from anyres_vlm.data.sources import Source, open_source
from anyres_vlm.doctor.finding import Finding, gigabytes, judge
from anyres_vlm.doctor.run import require_reachable
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.geometry import Tiling
from anyres_vlm.inference import Assistant, Conversation
from anyres_vlm.model.files import parsing
from anyres_vlm.model.generation import Decoding
from anyres_vlm.model.hub import build_model, describe_model
from anyres_vlm.model.pretrained import load_pretrained
from anyres_vlm.model.skeleton import skeleton
from anyres_vlm.model.stock import stock_obstacle
from anyres_vlm.preflight.replica import choose, look, replicate, small_files, weight_files, write_records
from anyres_vlm.schema import ImageRef, Record, Turn
from anyres_vlm.train.engine.deepspeed_settings import find_preset, resolve_deepspeed
from anyres_vlm.train.engine.engine import require_trackers
from anyres_vlm.train.metrics import METRICS_FILE, read_metrics
from anyres_vlm.train.recipe import trained_rates

STAGES: tuple[StageName, ...] = get_args(StageName)
STEPS = 6  # optimizer steps of a stage
SAVE_EVERY = 3  # of them; the kill comes behind step 5, so that two steps are repeated
KILL_AFTER = 5
SHARE_FILLED = 0.8  # of the packs' room is for the chosen records: packs do not fill to the end
RENDERED = 48  # samples where there is no data
PATIENCE_S = 600  # for a training process
REPLAYED = ("train/loss", "train/grad_norm")  # equal to the last digit when a step is repeated
DEVICE_RTOL = 1e-3  # on a GPU, whose attention adds up gradients in no fixed order
NEW_TOKENS = 8  # of an answer that is compared
SAID = re.compile(r"^(?:\[rank\d+\]: )?error: (.*)$", re.MULTILINE)
RAISED = re.compile(r"^(?:\[rank\d+\]: )?([\w.]+(?:Error|Exception): .*(?:\n.+)?)$", re.MULTILINE)
LOST = "another rank has ended"


@dataclass(frozen=True)
class Tried:
    """One line of the table: what a step found and how long it took."""

    finding: Finding
    seconds: float


class NotTried(Exception):
    """A step lacks what an earlier one should have made."""


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
        self.before: dict[int, dict[str, float]] = {}  # steps of stage 2 that the killed run logged
        self.is_trained = False
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
            "train": self._train_and_kill,
            "resume": self._resume,
            "answers": self._compare_answers,
            "export": self._export,
            "model card": self._read_card,
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
            for finding in _caught("bases", lambda name=name: _check_files(name)):
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
        need = kept * one + finished + (kept + 1) * two  # the new one is written before the oldest goes
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
        conversation = ConversationTokenizer(settings.template or model.template, tokenizer)
        yield from self._judge(stage, source, IndexSettings(conversation, tiling, settings.max_length))

    def _judge(self, stage: StageName, source: Source, index: IndexSettings) -> Iterator[Finding]:
        check, settings = f"{stage} data", self.config.stage(stage)
        table = look(source, index)
        status = np.array(table["status"].to_pylist())
        tokens, bad, limit = table["tokens"].to_numpy(), status != OK, settings.data.max_bad_fraction
        seen = f"{len(status):,} of {len(source):,} records looked at"
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in zip(*np.unique(status[bad], return_counts=True)))
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
        room = int(SHARE_FILLED * STEPS * self.ranks * settings.capacity)
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

    def _train_and_kill(self) -> Iterator[Finding]:
        """Both stages; in the second all ranks are killed behind a checkpoint."""
        config = self._derived()
        with self._started(config) as ranks:
            metrics, saved = self._run / "stage2" / METRICS_FILE, self._run / "stage2" / "checkpoints"
            deadline = time.monotonic() + PATIENCE_S
            while time.monotonic() < deadline and all(rank.poll() is None for rank in ranks):
                steps = _logged(metrics)
                if len(steps) >= KILL_AFTER and any(saved.glob("step-*")):
                    break
                time.sleep(0.02)
            codes = [rank.poll() for rank in ranks]
        self.before = _logged(metrics)
        if any(code not in (None, 0) for code in codes):
            yield self._failure("train")
            return
        if len(self.before) < KILL_AFTER:
            yield Finding("train", "fail", f"no step {KILL_AFTER} of stage 2 within {PATIENCE_S} s", self._log_hint())
            return
        self.is_trained = True
        where = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
        presets = ", ".join(f"{s} {config.stage(s).deepspeed or 'plain'}" for s in STAGES)
        yield Finding(
            "train",
            "ok",
            f"{STEPS} steps of stage 1 and {len(self.before)} of stage 2 on {self.ranks} ranks ({where}; {presets}), then killed",
        )
        yield from self._check_unread()

    def _check_unread(self) -> Iterator[Finding]:
        """Images whose headers were good and whose pixels are not."""
        lost = sorted(set(re.findall(r"left out: (.*)", self._log.read_text(encoding="utf-8", errors="replace"))))
        if lost:
            words = f"{len(lost)} of the chosen records could not be read in training, such as: {lost[0]}"
            yield Finding("train", "warn", words, "replace those images: more than max_bad_fraction of them end a run")

    def _resume(self) -> Iterator[Finding]:
        if not self.is_trained:
            raise NotTried("it needs the killed run")
        config = self._derived()
        with self._started(config) as ranks:
            deadline = time.monotonic() + PATIENCE_S
            while time.monotonic() < deadline and any(rank.poll() is None for rank in ranks):
                time.sleep(0.02)
            codes = [rank.poll() for rank in ranks]
        if any(codes) or None in codes:
            self.is_trained = False
            yield self._failure("resume")
            return
        after = _logged(self._run / "stage2" / METRICS_FILE)
        resumed = re.search(
            r"stage2: .*resumed after step (\d+)", self._log.read_text(encoding="utf-8", errors="replace")
        )
        tolerance = DEVICE_RTOL if torch.cuda.is_available() else 0.0
        for step, row in self.before.items():
            for key in REPLAYED:
                if not np.isclose(after[step].get(key, 0), row.get(key, 0), rtol=tolerance, atol=0):
                    words = (
                        f"step {step} had {key}={row.get(key)} before the kill and {after[step].get(key)} when repeated"
                    )
                    yield Finding(
                        "resume", "fail", words, "the run cannot be trusted to resume: report this with the config"
                    )
                    return
        if resumed is None:
            yield Finding("resume", "fail", "no checkpoint was resumed from after the kill", self._log_hint())
            return
        repeated = len(self.before) - int(resumed[1])
        yield Finding(
            "resume", "ok", f"after step {resumed[1]}; {repeated} steps repeated with equal loss and gradient norm"
        )

    def _compare_answers(self) -> Iterator[Finding]:
        """Greedy answers of the finished folder, ours and those of stock transformers where it can load it."""
        folder = self._finished()
        model, tokenizer = load_pretrained(folder)
        assistant = Assistant(model, tokenizer)
        conversation = self._question(folder)
        asked = [assistant._prompt(conversation)]
        ours = [token for _, token in assistant._tokens(asked, Decoding(NEW_TOKENS))]
        if (obstacle := stock_obstacle(model)) is not None:
            yield Finding("answers", "ok", f"{len(ours)} tokens from the finished folder; {obstacle}")
            return
        text = assistant.conversation.render(conversation.turns, prompt=True)[0]
        stock: Any = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        stock = stock.eval().to(assistant.device)
        inputs = LlavaNextProcessor.from_pretrained(folder)(
            images=list(conversation.images) or None, text=text, return_tensors="pt"
        ).to(assistant.device)
        length = inputs["input_ids"].shape[1]
        with torch.inference_mode():
            found = stock.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[0, length:].tolist()
        ends = assistant.conversation.stop_ids
        theirs = [token for token in found if token not in ends]
        words = f"{len(ours)} greedy tokens of {asked[0].ids.size:,}: ours {ours}, stock transformers {theirs}"
        if ours == theirs:
            words = f"{len(ours)} greedy tokens on a prompt of {length:,} tokens are those of stock transformers"
        yield judge("answers", ours == theirs, words, "the folder would be served wrongly: report this with the config")

    def _question(self, folder: Path) -> Conversation:
        """The first question of a real record with images, or of a rendered one."""
        if (chosen := self.chosen.get("stage2")) is not None:
            record = chosen.example
        else:
            source = open_source(next((self._run / "data").glob("instructions/*.json")))
            record = next(one for one in source.records(0, len(source)) if isinstance(one, Record) and one.images)
        turn = record.turns[0]
        images: list[ImageRef] = list(record.images[: turn.text.count("<image>")])
        return Conversation([turn], [open_image(image) for image in images])

    def _export(self) -> Iterator[Finding]:
        folder, out = self._finished(), self.work / "export"
        with self._log.open("ab") as log:
            words = [sys.executable, "-m", "anyres_vlm", "export", str(folder), str(out)]
            done = subprocess.run(words, env=self._environment(), stdout=log, stderr=subprocess.PIPE, text=True)
        said = SAID.search(done.stderr)
        if done.returncode == 2 and said is not None and "cannot be exported" in said[1]:
            yield Finding("export", "ok", said[1].partition("cannot be exported: ")[2])
            return
        remedy = self._log_hint()
        yield judge("export", done.returncode == 0, said[1] if said else "a stock LlavaNext folder", remedy)

    def _read_card(self) -> Iterator[Finding]:
        path = self._finished() / "README.md"
        front = yaml.safe_load(path.read_text(encoding="utf-8").split("---\n")[1])
        yield judge("model card", "library_name" in front, f"{path.name} with {', '.join(front)}", self._log_hint())

    @property
    def _run(self) -> Path:
        return self.work / "run"

    @property
    def _log(self) -> Path:
        return self.work / "train.log"

    def _log_hint(self) -> str:
        return f"see {self._log}"

    def _finished(self) -> Path:
        folder = self._run / "stage2" / "model"
        if not folder.is_dir():
            raise NotTried("it needs the finished run")
        return folder

    def _derived(self) -> RunConfig:
        """The run's configuration on the replica; everything that decides how a sample is treated stays."""
        if self.model is None:
            raise NotTried("it needs the replica")
        stages: dict[str, Any] = {}
        for stage in STAGES:
            settings = self.config.stage(stage)
            changes: dict[str, Any] = {"data": self._data(stage), "packs_per_step": self.ranks, "epochs": STEPS}
            if stage in self.broken_presets:
                changes["deepspeed"] = None
            stages[stage] = settings.model_copy(update=changes)
        changes = {**stages, "model": self.model, "trackers": (), "workers": min(self.config.workers, 1)}
        changes |= {"save_every": SAVE_EVERY, "save_minutes": None, "rank_timeout_minutes": 10.0}
        if self.config.cache_features is not None:
            changes["cache_features"] = self.config.cache_features.model_copy(update={"folder": self.work / "features"})
        return self.config.model_copy(update=changes)

    def _data(self, stage: StageName) -> DataConfig:
        data = self.config.stage(stage).data
        if (chosen := self.chosen.get(stage)) is not None:
            changes: dict[str, Any] = {"path": chosen.path, "images": chosen.images}
        else:
            purpose = "captions" if stage == "stage1" else "instructions"
            changes = {"path": None, "images": None, "rendered": data.rendered or purpose, "samples": RENDERED}
        return data.model_copy(update={**changes, "index": None, "max_bad_fraction": 0.9})

    @contextmanager
    def _started(self, config: RunConfig) -> Iterator[list[subprocess.Popen[bytes]]]:
        """The ranks of `anyres train`; whoever still runs when the block ends is killed."""
        path = self.work / "config.yaml"
        path.write_text(yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False), encoding="utf-8")
        words = [sys.executable, "-m", "anyres_vlm", "train", "--config", str(path), "--output", str(self._run)]
        words += ["--max-steps", str(STEPS)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = []
        with self._log.open("ab") as log:
            for rank in range(self.ranks):
                environment = self._environment()
                if self.ranks > 1:
                    environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.ranks)}
                    environment |= {"LOCAL_WORLD_SIZE": str(self.ranks), "MASTER_ADDR": "127.0.0.1"}
                    environment["MASTER_PORT"] = str(port)
                ranks.append(subprocess.Popen(words, env=environment, stdout=log, stderr=log, start_new_session=True))
        try:
            yield ranks
        finally:
            for rank in ranks:
                if rank.poll() is None:
                    os.killpg(rank.pid, signal.SIGKILL)
                rank.wait()

    def _environment(self) -> dict[str, str]:
        """Without the variables of a launcher or of Slurm that this process may have been started under."""
        launcher = re.compile(r"RANK$|WORLD_SIZE$|MASTER_|SLURM_|TORCHELASTIC_|PET_")
        kept = {name: value for name, value in os.environ.items() if not launcher.search(name)}
        threads = max((os.cpu_count() or 1) // self.ranks, 1)
        return kept | {"OMP_NUM_THREADS": kept.get("OMP_NUM_THREADS", str(threads)), "ANYRES_FOLLOW_LINKS": "1"}

    def _failure(self, check: str) -> Finding:
        """The first error that a rank printed, or raised without a word of this package; not that it lost another."""
        text = self._log.read_text(encoding="utf-8", errors="replace")
        said = [line for line in [*SAID.findall(text), *RAISED.findall(text)] if not line.startswith(LOST)]
        last = next((line for line in reversed(text.splitlines()) if line.strip()), "ended without a word")
        return Finding(check, "fail", said[0] if said else last, self._log_hint())


def on_data(config: RunConfig, path: Path | None, images: Path | None) -> RunConfig:
    """The configuration with other records in both stages; None leaves each stage's own."""
    if path is None:
        return config
    other = {"path": path.expanduser(), "images": None if images is None else images.expanduser()}
    other |= {"rendered": None, "samples": None, "kinds": None, "index": None}
    changes = {}
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
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(model.llm, trust_remote_code=False)
    return int(getattr(config, "text_config", config).vocab_size)


def _checkpoint_bytes(config: RunConfig, stage: StageName, sizes: dict[str, int]) -> int:
    """Bytes of a checkpoint: trained weights and their two moments in fp32, frozen ones as they are held."""
    trained = trained_rates(config, stage)
    frozen = 2 if config.stage(stage).deepspeed and config.precision == "bf16" else 4
    return sum(size * (12 if part in trained else frozen) for part, size in sizes.items())


def _logged(metrics: Path) -> dict[int, dict[str, float]]:
    """The steps that a run has logged."""
    return {int(row["step"]): row for row in read_metrics(metrics)} if metrics.exists() else {}
