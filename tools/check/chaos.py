"""Kill training at random moments, also during saves, and compare the result bit for bit with an undisturbed run.

    python tools/check/chaos.py --kills 20                       # on 1 and on 2 ranks, each with the whole model
    python tools/check/chaos.py --kills 20 --ranks 2 --deepspeed zero2

Both stages run on rendered pictures with tiny random models, a few seconds per start. Every rank is a process that runs
the command, without a launcher. SIGKILL hits one rank at random, and the others must end by themselves. Every second
kill waits until a checkpoint is being written. Prints one table per number of ranks; the exit status is 1 if weights or
losses differ.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

import anyres_vlm.train.run  # noqa: F401  # imported once, before the runs are forked
from anyres_vlm.checkpoints.tokenizer import load_tokenizer
from anyres_vlm.cli.main import main as main_command
from anyres_vlm.train.checkpoint import PREFIX
from anyres_vlm.train.metrics import METRICS_FILE, read_metrics

STAGES = ("stage1", "stage2")
SETTINGS = [
    "stage1.data.samples=120",
    "stage2.data.samples=120",
    "stage1.max_length=512",
    "stage1.capacity=512",
    "stage2.capacity=1024",
    "stage1.packs_per_step=2",
    "stage2.packs_per_step=2",
    "stage1.epochs=4",
    "stage2.epochs=4",
    "save_every=2",
]
LIFE_S = 600  # a run that neither ends nor reaches its kill within this time is stuck
END_S = 120  # time in which the remaining ranks must end
FORK = get_context("fork")  # a forked run has all imports done and starts within a second


@dataclass(frozen=True)
class Kill:
    """Where a run was killed, according to its files, and from where it had resumed."""

    rank: int
    stage: str
    step: int  # last finished step
    saving: bool
    ended_s: float  # time until the other ranks ended
    resumed: str


def live(words: Sequence[str], launch: dict[str, str], log: Path) -> None:
    """Run the command in the process of one rank."""
    os.environ.update(launch)
    torch.set_num_threads(1)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(main_command(words))


class Lives:
    """The starts of one training run in an output folder; all ranks are started without a launcher."""

    def __init__(self, output: Path, ranks: int, settings: Sequence[str], more: Sequence[str]) -> None:
        self.output, self.ranks, self.settings, self.more = output, ranks, settings, more

    def start(self) -> list[BaseProcess]:
        """Start all ranks, each with its own log."""
        sets = [word for setting in self.settings for word in ("--set", setting)]
        words = ["train", "--output", str(self.output), *sets, *self.more]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            world = {
                "WORLD_SIZE": str(self.ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(free.getsockname()[1]),
            }
        self.old_saves = {stage: set(self.saving(stage)) for stage in STAGES}
        processes = []
        for rank in range(self.ranks):
            self.log(rank).write_bytes(b"")
            launch = {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} if self.ranks > 1 else {}
            processes.append(FORK.Process(target=live, args=(words, launch, self.log(rank))))
            processes[-1].start()
        return processes

    def log(self, rank: int) -> Path:
        """Return the log of a rank of the newest start."""
        return self.output.with_name(f"{self.output.name}-{rank}.log")

    def finish(self) -> None:
        """Run to the end without a kill. Raises `RuntimeError` if the run fails."""
        for rank, process in enumerate(self.start()):
            process.join(LIFE_S)
            if process.exitcode != 0:
                raise RuntimeError(f"rank {rank} failed: {self.log(rank).read_text()[-2000:]}")

    def resumed(self) -> str:
        """Return the stage and step from which the newest start resumed."""
        stage = re.search(r"(stage\d): .* parameters trained(?:, resumed after step (\d+))?", self.log(0).read_text())
        return f"{stage[1]} step {stage[2] or 0}" if stage else "-"

    def trains(self, stage: str) -> bool:
        """Return whether the newest start has reached a stage; the files of earlier starts are cut back by then."""
        return f"{stage}: " in self.log(0).read_text()

    def finished(self, stage: str) -> int:
        """Return the last recorded step of a stage."""
        path = self.output / stage / METRICS_FILE
        rows = read_metrics(path) if path.exists() else []
        return int(rows[-1]["step"]) if rows else 0

    def saving(self, stage: str) -> list[tuple[Path, int]]:
        """Return the incomplete checkpoints of a stage with their inodes; a later save creates its folder again."""
        found = []
        for path in (self.output / stage / "checkpoints").glob(f".{PREFIX}*.partial"):
            with suppress(FileNotFoundError):  # the checkpoint was just completed
                found.append((path, path.stat().st_ino))
        return found

    def saves_now(self, stage: str) -> bool:
        """Return whether the newest start is writing a checkpoint."""
        return bool(set(self.saving(stage)) - self.old_saves[stage])

    def wait_until(self, is_there: Callable[[], bool], process: BaseProcess) -> bool:
        """Wait for a moment; return False if the process ended first. Raises `RuntimeError` if the process is stuck."""
        deadline = time.monotonic() + LIFE_S
        while not is_there():
            if not process.is_alive():
                return False
            if time.monotonic() > deadline:
                raise RuntimeError(f"no progress in {LIFE_S} s: {self.log(0).read_text()[-2000:]}")
            time.sleep(0.001)
        return True


def disturbed(lives: Lives, kills: int, steps: dict[str, int], rng: random.Random) -> list[Kill]:
    """Kill a run this many times over both stages, then let it finish."""
    moments = [(stage, step) for stage in STAGES for step in range(1, steps[stage] - 2)]
    done: list[Kill] = []
    for number, (stage, step) in enumerate(sorted(rng.choices(moments, k=kills))):
        wants_save = number % 2 == 0
        processes = lives.start()

        def is_there(stage: str = stage, step: int = step, wants_save: bool = wants_save) -> bool:
            if not lives.trains(stage) or (wants_save and not lives.saves_now(stage)):
                return False
            return lives.finished(stage) >= step

        if not lives.wait_until(is_there, processes[0]):
            raise RuntimeError(f"the run ended before kill {number + 1}: {lives.log(0).read_text()[-2000:]}")
        time.sleep(rng.uniform(0, 0.002 if wants_save else 0.3))
        rank = 0 if wants_save else rng.randrange(lives.ranks)  # rank 0 writes; the others do nothing meanwhile
        processes[rank].kill()
        processes[rank].join()
        killed = time.monotonic()
        for process in processes:
            process.join(END_S)
            if process.exitcode is None:
                raise RuntimeError(f"kill {number + 1}: a rank still runs {END_S} s after the other was killed")
        ended_s = time.monotonic() - killed
        now = STAGES[(lives.output / "stage1" / "model").exists() and (lives.output / "stage2").exists()]
        done.append(Kill(rank, now, lives.finished(now), lives.saves_now(now), ended_s, lives.resumed()))
        print(f"kill {number + 1}: {done[-1]}", file=sys.stderr, flush=True)
    lives.finish()
    return done


def write_bases(folder: Path) -> list[str]:
    """Write small random base models, for fast starts; return the settings that name them."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer("embedded:tiny-lm")
    shape = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**shape, image_size=28, patch_size=14)).save_pretrained(folder / "vit")
    LlamaForCausalLM(LlamaConfig(**shape, vocab_size=len(tokenizer))).save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    return [f"model.llm={folder}/llm", f"model.encoder.name={folder}/vit"]


def differences(found: Path, expected: Path) -> list[str]:
    """Return the weights and losses of both stages that are not bit-exact."""
    unequal = []
    for stage in STAGES:
        ours, theirs = (load_file(run / stage / "model" / "model.safetensors") for run in (found, expected))
        names = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
        unequal += [f"{stage}: {len(names)} of {len(theirs)} weights"] if names or ours.keys() != theirs.keys() else []
        rows = [read_metrics(run / stage / METRICS_FILE) for run in (found, expected)]
        losses = [[(row["step"], row["train/loss"]) for row in run] for run in rows]
        unequal += [f"{stage}: losses"] if losses[0] != losses[1] else []
    return unequal


def show(ranks: int, kills: Sequence[Kill], unequal: Sequence[str], seconds: float) -> None:
    """Print one Markdown table."""
    print(f"\n{ranks} rank{'s' * (ranks > 1)}: {len(kills)} kills in {seconds / 60:.0f} minutes\n")
    print("| kill | resumed from | rank and last step | during a save | other ranks ended |")
    print("|---|---|---|---|---|")
    for number, kill in enumerate(kills, start=1):
        others = f"after {kill.ended_s:.1f} s" if ranks > 1 else "-"
        where = f"{kill.rank} {kill.stage} step {kill.step}"
        print(f"| {number} | {kill.resumed} | {where} | {'yes' if kill.saving else 'no'} | {others} |")
    verdict = f"DIFFERENT: {'; '.join(unequal)}" if unequal else "bit-exact"
    print(f"\nweights and losses of both stages compared with an undisturbed run: {verdict}", flush=True)


def main() -> int:
    """Run what the command line names. Returns 1 if a result differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="kills for each number of ranks")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--deepspeed", help="DeepSpeed preset; without one every rank has the whole model")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    arguments = parser.parse_args()
    more = ["--deepspeed", arguments.deepspeed] if arguments.deepspeed else []
    failed = False
    for ranks in arguments.ranks:
        folder = Path(tempfile.mkdtemp(prefix="chaos-"))
        started = time.monotonic()
        settings = [*SETTINGS, *write_bases(folder)]
        whole = Lives(folder / "whole", ranks, settings, more)
        whole.finish()
        steps = {stage: whole.finished(stage) for stage in STAGES}
        lives = Lives(folder / "killed", ranks, settings, more)
        kills = disturbed(lives, arguments.kills, steps, random.Random(f"{arguments.seed} {ranks}"))
        unequal = differences(lives.output, whole.output)
        show(ranks, kills, unequal, time.monotonic() - started)
        failed = failed or bool(unequal)
        if not unequal:
            shutil.rmtree(folder)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
