"""Training of a rehearsal: run `anyres train` in separate processes, kill it, resume it and test the final model."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import GenerationConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor

from anyres_vlm.checkpoints.load_save import load_pretrained
from anyres_vlm.checkpoints.stock import stock_obstacle
from anyres_vlm.config import STAGES, RunConfig
from anyres_vlm.data.images import open_image
from anyres_vlm.data.sources import open_source
from anyres_vlm.inference.assistant import Assistant, Conversation
from anyres_vlm.inference.generation import Decoding
from anyres_vlm.preflight.machine import Finding, judge
from anyres_vlm.schema import IMAGE_TOKEN, Record
from anyres_vlm.train.checkpoint import PREFIX
from anyres_vlm.train.metrics import METRICS_FILE, read_metrics

STEPS = 6  # optimizer steps of a stage
SAVE_EVERY = 3  # steps
KILL_AFTER = 5  # steps, so that 4 and 5 are repeated; step 5 depends on the restored optimizer state
TIMEOUT_S = 600  # without a new line in the log
GRACE_S = 2  # for the other ranks' messages after one rank has failed
REPEATED = ("train/loss", "train/grad_norm")  # bit-identical when a step is repeated
DEVICE_RTOL = 1e-3  # on a GPU, where attention accumulates gradients in no fixed order
NEW_TOKENS = 8  # of an answer that is compared
REPORTED = re.compile(r"^(?:\[rank\d+\]: )?error: (.*)$", re.MULTILINE)
RAISED = re.compile(r"^(?:\[rank\d+\]: )?([\w.]+(?:Error|Exception): .*(?:\n.+)?)$", re.MULTILINE)
LOST = "another rank has ended"
LAUNCHER = re.compile(r"RANK$|WORLD_SIZE$|MASTER_|SLURM_|TORCHELASTIC_|PET_")  # variables that launchers set for ranks


class Skipped(Exception):
    """Raised by a step that lacks the result of an earlier one."""


class Trial:
    """A run on replicas; `example` is a record with an image for a question to the final model."""

    def __init__(self, config: RunConfig, work: Path, ranks: int, example: Record | None) -> None:
        self.config, self.work, self.ranks, self.example = config, work, ranks, example
        self.before: dict[int, dict[str, float]] = {}  # metrics by step of stage 2, logged by the killed run
        self.is_trained = False

    def train_and_kill(self) -> Iterator[Finding]:
        """Train both stages; kill all ranks in stage 2 once there are a checkpoint and later steps."""
        metrics, saved = self._run / "stage2" / METRICS_FILE, self._run / "stage2" / "checkpoints"

        def is_due() -> bool:
            return len(_logged(metrics)) >= KILL_AFTER and any(saved.glob(f"{PREFIX}*"))

        codes = self._train(is_due)
        self.before = _logged(metrics)
        if any(code not in (None, 0) for code in codes):
            yield self._failure("train")
            return
        if len(self.before) < KILL_AFTER:
            yield Finding("train", "fail", f"nothing was logged for {TIMEOUT_S} s", self._log_hint())
            return
        self.is_trained = True
        shutil.rmtree(self._run / "stage2" / "model", ignore_errors=True)  # in case the run ended before the kill
        where = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
        presets = ", ".join(f"{stage} {self.config.stage(stage).deepspeed or 'without DeepSpeed'}" for stage in STAGES)
        words = f"{STEPS} and {len(self.before)} steps on {self.ranks} x {where} ({presets}), then killed"
        yield Finding("train", "ok", words)
        if lost := sorted(set(re.findall(r"left out: (.*)", self._text))):
            words = f"{len(lost)} of the chosen records could not be read in training, for example: {lost[0]}"
            remedy = "replace these images: a run ends if there are more than max_bad_fraction of them"
            yield Finding("train", "warn", words, remedy)

    def resume(self) -> Iterator[Finding]:
        """Run the same command again to its end and check that repeated steps have the same loss and gradient norm."""
        if not self.is_trained:
            raise Skipped("needs the killed run")
        if any(code != 0 for code in self._train(lambda: False)):
            yield self._failure("resume")
            return
        after = _logged(self._run / "stage2" / METRICS_FILE)
        tolerance = DEVICE_RTOL if torch.cuda.is_available() else 0.0
        for step, row in self.before.items():
            for key in REPEATED:
                then, now = row.get(key, 0.0), after[step].get(key, 0.0)
                if abs(then - now) > tolerance * abs(then):
                    words = f"step {step} had {key}={then} before the kill and {now} when repeated"
                    remedy = "resuming changes the result: please report this with the config"
                    yield Finding("resume", "fail", words, remedy)
                    return
        resumed = re.search(r"stage2: .*resumed after step (\d+)", self._text)
        if resumed is None:
            yield Finding("resume", "fail", "the run started over instead of resuming", self._log_hint())
            return
        repeated = len(self.before) - int(resumed[1])
        words = f"after step {resumed[1]}; {repeated} repeated steps have the same loss and gradient norm"
        yield Finding("resume", "ok", words)

    def compare_answers(self) -> Iterator[Finding]:
        """Compare greedy answers of our code and of stock transformers, if it can load the final model."""
        folder = self._final_model()
        model, tokenizer = load_pretrained(folder)
        assistant = Assistant(model, tokenizer)
        question = self._question()
        ours: list[int] = []  # with the end token, which answers do not contain
        for _ in assistant.tokens([assistant.prompt(question)], Decoding(NEW_TOKENS), lambda new, _: ours.extend(new)):
            pass
        if (obstacle := stock_obstacle(model)) is not None:
            yield Finding("answers", "ok", f"{len(ours)} tokens generated; {obstacle}")
            return
        text = assistant.conversation.render(question.turns, prompt=True)[0]
        stock: Any = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        stock = stock.eval().to(assistant.device)
        processor: Any = LlavaNextProcessor.from_pretrained(folder)
        inputs = processor(images=list(question.images) or None, text=text, return_tensors="pt").to(assistant.device)
        length = inputs["input_ids"].shape[1]
        greedy = GenerationConfig(
            max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=stock.generation_config.eos_token_id
        )
        theirs = stock.generate(**inputs, generation_config=greedy)[0, length:].tolist()
        words = f"greedy tokens are {ours}, with stock transformers {theirs}"
        if ours == theirs:
            words = f"{len(ours)} greedy tokens after a prompt of {length:,} equal those of stock transformers"
        remedy = "stock transformers would answer wrongly: please report this with the config"
        yield judge("answers", ours == theirs, words, remedy)

    def _question(self) -> Conversation:
        """Return the first question of the example, or of a rendered record with images."""
        record = self.example
        if record is None:
            source = open_source(next((self._run / "data").glob("instructions/*.json")))
            record = next(one for one in source.records(0, len(source)) if isinstance(one, Record) and one.images)
        turn = record.turns[0]
        shown = record.images[: turn.text.count(IMAGE_TOKEN)]
        return Conversation([turn], [open_image(image) for image in shown])

    def export(self) -> Iterator[Finding]:
        """Export the final model; a refusal because stock transformers cannot express it is no failure."""
        folder, out = self._final_model(), self.work / "export"
        words = [sys.executable, "-m", "anyres_vlm", "export", str(folder), str(out)]
        ended = subprocess.run(words, env=self._environment(), capture_output=True, text=True)
        reported = REPORTED.search(ended.stderr)
        if ended.returncode == 2 and reported is not None and "cannot be exported" in reported[1]:
            yield Finding("export", "ok", reported[1].partition("cannot be exported: ")[2])
            return
        last = next(reversed(ended.stderr.splitlines()), "ended without a message")
        found = "a stock LlavaNext folder" if ended.returncode == 0 else reported[1] if reported else last
        yield judge("export", ended.returncode == 0, found, f"to reproduce: anyres export {folder} OUT")

    def read_card(self) -> Iterator[Finding]:
        """Check that the model card has the metadata block that hubs read."""
        path = self._final_model() / "README.md"
        front = yaml.safe_load(path.read_text(encoding="utf-8").split("---\n")[1])
        yield judge("model card", "library_name" in front, f"{path.name} with {', '.join(front)}", self._log_hint())

    @property
    def _run(self) -> Path:
        return self.work / "run"

    @property
    def _log(self) -> Path:
        return self.work / "train.log"

    @property
    def _text(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def _log_hint(self) -> str:
        return f"see {self._log}"

    def _final_model(self) -> Path:
        folder = self._run / "stage2" / "model"
        if not folder.is_dir():
            raise Skipped("needs the finished run")
        return folder

    def _train(self, should_stop: Callable[[], bool]) -> list[int | None]:
        """Run the ranks of `anyres train` to their end, or kill them when `should_stop` returns true or time is up.

        Returns their exit statuses, None for killed ones.
        """
        path = self.work / "config.yaml"
        path.write_text(yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
        words = [sys.executable, "-m", "anyres_vlm", "train", "--config", str(path), "--output", str(self._run)]
        words += ["--max-steps", str(STEPS)]
        with self._log.open("ab") as log:
            ranks = [
                subprocess.Popen(words, env=environment, stdout=log, stderr=log, start_new_session=True)
                for environment in self._rank_environments()
            ]
        length, deadline = 0, time.monotonic() + TIMEOUT_S
        try:
            while any(rank.poll() is None for rank in ranks) and not should_stop() and time.monotonic() < deadline:
                if (logged := self._log.stat().st_size) > length:
                    length, deadline = logged, time.monotonic() + TIMEOUT_S
                if any(rank.poll() not in (None, 0) for rank in ranks):
                    time.sleep(GRACE_S)  # let the other ranks report their errors
                    break
                time.sleep(0.02)
            return [rank.poll() for rank in ranks]
        finally:
            for rank in ranks:
                if rank.poll() is None:
                    os.killpg(rank.pid, signal.SIGKILL)
                rank.wait()

    def _rank_environments(self) -> Iterator[dict[str, str]]:
        """Yield the environment that a launcher would give each rank."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        size = str(self.ranks)
        for rank in map(str, range(self.ranks)):
            group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            yield self._environment() | (group if self.ranks > 1 else {})

    def _environment(self) -> dict[str, str]:
        """Return this process's environment without the variables of a launcher or of Slurm."""
        kept = {name: value for name, value in os.environ.items() if not LAUNCHER.search(name)}
        threads = max((os.cpu_count() or 1) // self.ranks, 1)
        return kept | {"OMP_NUM_THREADS": kept.get("OMP_NUM_THREADS", str(threads)), "ANYRES_FOLLOW_LINKS": "1"}

    def _failure(self, check: str) -> Finding:
        """Return the first error that a rank reported or raised, other than the loss of another rank."""
        errors = [
            line for line in [*REPORTED.findall(self._text), *RAISED.findall(self._text)] if not line.startswith(LOST)
        ]
        last = next((line for line in reversed(self._text.splitlines()) if line.strip()), "ended without a message")
        return Finding(check, "fail", " ".join((errors[0] if errors else last).split()), self._log_hint())


def _logged(metrics: Path) -> dict[int, dict[str, float]]:
    """Return the logged metrics by step."""
    return {int(row["step"]): row for row in read_metrics(metrics)} if metrics.exists() else {}
