"""The training of a rehearsal: `anyres train` in processes of its own, killed, resumed, and its model tried."""

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
from typing import Any, get_args

import torch
import yaml
from transformers import GenerationConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor

from anyres_vlm.checkpoints.load_save import load_pretrained
from anyres_vlm.checkpoints.stock import stock_obstacle
from anyres_vlm.config import RunConfig, StageName
from anyres_vlm.data.images import open_image
from anyres_vlm.data.sources import open_source
from anyres_vlm.inference.assistant import Assistant, Conversation
from anyres_vlm.inference.generation import Decoding
from anyres_vlm.preflight.machine import Finding, judge
from anyres_vlm.schema import IMAGE_TOKEN, Record
from anyres_vlm.train.checkpoint import PREFIX
from anyres_vlm.train.metrics import METRICS_FILE, read_metrics

STAGES: tuple[StageName, ...] = get_args(StageName)
STEPS = 6  # optimizer steps of a stage
SAVE_EVERY = 3  # of them
KILL_AFTER = 5  # so that steps 4 and 5 are repeated: the second of them depends on the restored optimizer
PATIENCE_S = 600  # for the next line of a training process
GRACE_S = 2  # after one rank has failed
REPLAYED = ("train/loss", "train/grad_norm")  # equal to the last digit when a step is repeated
DEVICE_RTOL = 1e-3  # on a GPU, whose attention adds up gradients in no fixed order
NEW_TOKENS = 8  # of an answer that is compared
SAID = re.compile(r"^(?:\[rank\d+\]: )?error: (.*)$", re.MULTILINE)
RAISED = re.compile(r"^(?:\[rank\d+\]: )?([\w.]+(?:Error|Exception): .*(?:\n.+)?)$", re.MULTILINE)
LOST = "another rank has ended"
LAUNCHER = re.compile(r"RANK$|WORLD_SIZE$|MASTER_|SLURM_|TORCHELASTIC_|PET_")  # variables of a process that is a rank


class NotTried(Exception):
    """A step lacks what an earlier one should have made."""


class Trial:
    """A run on replicas; `example` is a record with an image that the finished model is asked about."""

    def __init__(self, config: RunConfig, work: Path, ranks: int, example: Record | None) -> None:
        self.config, self.work, self.ranks, self.example = config, work, ranks, example
        self.before: dict[int, dict[str, float]] = {}  # steps of stage 2 that the killed run logged
        self.is_trained = False

    def train_and_kill(self) -> Iterator[Finding]:
        """Train both stages; in the second all ranks are killed when a checkpoint and later steps are there."""
        metrics, saved = self._run / "stage2" / METRICS_FILE, self._run / "stage2" / "checkpoints"

        def is_far_enough() -> bool:
            return len(_logged(metrics)) >= KILL_AFTER and any(saved.glob(f"{PREFIX}*"))

        codes = self._train(is_far_enough)
        self.before = _logged(metrics)
        if any(code not in (None, 0) for code in codes):
            yield self._failure("train")
            return
        if len(self.before) < KILL_AFTER:
            yield Finding("train", "fail", f"nothing was logged for {PATIENCE_S} s", self._log_hint())
            return
        self.is_trained = True
        shutil.rmtree(self._run / "stage2" / "model", ignore_errors=True)  # of a run that was faster than the kill
        where = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
        presets = ", ".join(f"{stage} {self.config.stage(stage).deepspeed or 'without DeepSpeed'}" for stage in STAGES)
        words = f"{STEPS} and {len(self.before)} steps on {self.ranks} x {where} ({presets}), then killed"
        yield Finding("train", "ok", words)
        if lost := sorted(set(re.findall(r"left out: (.*)", self._text))):
            words = f"{len(lost)} of the chosen records could not be read in training, such as: {lost[0]}"
            yield Finding("train", "warn", words, "replace those images: more than max_bad_fraction of them end a run")

    def resume(self) -> Iterator[Finding]:
        """Run the same command again to its end: the steps that are repeated must have the same numbers."""
        if not self.is_trained:
            raise NotTried("it needs the killed run")
        if any(code != 0 for code in self._train(lambda: False)):
            yield self._failure("resume")
            return
        after = _logged(self._run / "stage2" / METRICS_FILE)
        tolerance = DEVICE_RTOL if torch.cuda.is_available() else 0.0
        for step, row in self.before.items():
            for key in REPLAYED:
                then, now = row.get(key, 0.0), after[step].get(key, 0.0)
                if abs(then - now) > tolerance * abs(then):
                    words = f"step {step} had {key}={then} before the kill and {now} when it was repeated"
                    yield Finding("resume", "fail", words, "resuming changes the result: report this with the config")
                    return
        resumed = re.search(r"stage2: .*resumed after step (\d+)", self._text)
        if resumed is None:
            yield Finding("resume", "fail", "the run began again instead of resuming", self._log_hint())
            return
        repeated = len(self.before) - int(resumed[1])
        words = f"after step {resumed[1]}; {repeated} repeated steps have the same loss and gradient norm"
        yield Finding("resume", "ok", words)

    def compare_answers(self) -> Iterator[Finding]:
        """Compare greedy answers of the finished folder: ours and, where it can load it, stock transformers'."""
        folder = self._finished()
        model, tokenizer = load_pretrained(folder)
        assistant = Assistant(model, tokenizer)
        question = self._question()
        ours: list[int] = []
        for _ in assistant.stream(
            question.turns, question.images, Decoding(NEW_TOKENS), lambda tokens, _: ours.extend(tokens)
        ):
            pass
        if (obstacle := stock_obstacle(model)) is not None:
            yield Finding("answers", "ok", f"{len(ours)} tokens from the finished folder; {obstacle}")
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
            words = f"{len(ours)} greedy tokens after a prompt of {length:,} are those of stock transformers"
        yield judge("answers", ours == theirs, words, "the folder would be served wrongly: report this with the config")

    def _question(self) -> Conversation:
        """The first question of a real record with images, or of a rendered one."""
        record = self.example
        if record is None:
            source = open_source(next((self._run / "data").glob("instructions/*.json")))
            record = next(one for one in source.records(0, len(source)) if isinstance(one, Record) and one.images)
        turn = record.turns[0]
        shown = record.images[: turn.text.count(IMAGE_TOKEN)]
        return Conversation([turn], [open_image(image) for image in shown])

    def export(self) -> Iterator[Finding]:
        """Export the finished folder, which is refused where stock transformers cannot express the model."""
        folder, out = self._finished(), self.work / "export"
        words = [sys.executable, "-m", "anyres_vlm", "export", str(folder), str(out)]
        done = subprocess.run(words, env=self._environment(), capture_output=True, text=True)
        said = SAID.search(done.stderr)
        if done.returncode == 2 and said is not None and "cannot be exported" in said[1]:
            yield Finding("export", "ok", said[1].partition("cannot be exported: ")[2])
            return
        last = next(reversed(done.stderr.splitlines()), "ended without a message")
        found = "a stock LlavaNext folder" if done.returncode == 0 else said[1] if said else last
        yield judge("export", done.returncode == 0, found, f"try it: anyres export {folder} OUT")

    def read_card(self) -> Iterator[Finding]:
        """Look for the model card's head, which hubs read."""
        path = self._finished() / "README.md"
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

    def _finished(self) -> Path:
        folder = self._run / "stage2" / "model"
        if not folder.is_dir():
            raise NotTried("it needs the finished run")
        return folder

    def _train(self, is_enough: Callable[[], bool]) -> list[int | None]:
        """Run the ranks of `anyres train` to their end, or kill them as soon as it is enough or takes too long.

        Returns their exit statuses, None for those that were killed here.
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
        length, deadline = 0, time.monotonic() + PATIENCE_S
        try:
            while any(rank.poll() is None for rank in ranks) and not is_enough() and time.monotonic() < deadline:
                if (logged := self._log.stat().st_size) > length:
                    length, deadline = logged, time.monotonic() + PATIENCE_S
                if any(rank.poll() not in (None, 0) for rank in ranks):
                    time.sleep(GRACE_S)  # the others may still have to say what they know
                    break
                time.sleep(0.02)
            return [rank.poll() for rank in ranks]
        finally:
            for rank in ranks:
                if rank.poll() is None:
                    os.killpg(rank.pid, signal.SIGKILL)
                rank.wait()

    def _rank_environments(self) -> Iterator[dict[str, str]]:
        """What a launcher would set for each rank."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        size = str(self.ranks)
        for rank in map(str, range(self.ranks)):
            group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            yield self._environment() | (group if self.ranks > 1 else {})

    def _environment(self) -> dict[str, str]:
        """Without the variables of a launcher or of Slurm that this process may have been started under."""
        kept = {name: value for name, value in os.environ.items() if not LAUNCHER.search(name)}
        threads = max((os.cpu_count() or 1) // self.ranks, 1)
        return kept | {"OMP_NUM_THREADS": kept.get("OMP_NUM_THREADS", str(threads)), "ANYRES_FOLLOW_LINKS": "1"}

    def _failure(self, check: str) -> Finding:
        """The first error that a rank reported or raised; that it lost another rank is no cause."""
        said = [line for line in [*SAID.findall(self._text), *RAISED.findall(self._text)] if not line.startswith(LOST)]
        last = next((line for line in reversed(self._text.splitlines()) if line.strip()), "ended without a message")
        return Finding(check, "fail", " ".join((said[0] if said else last).split()), self._log_hint())


def _logged(metrics: Path) -> dict[int, dict[str, float]]:
    """The steps that a run has logged."""
    return {int(row["step"]): row for row in read_metrics(metrics)} if metrics.exists() else {}
