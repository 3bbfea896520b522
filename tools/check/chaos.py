"""Kill training at random moments, during saves too, and compare its end with that of an undisturbed run, to the bit.

    python tools/check/chaos.py --kills 20                       # on 1 and on 2 ranks, the whole model on every rank
    python tools/check/chaos.py --kills 20 --ranks 2 --deepspeed zero2

Both stages run on rendered pictures with tiny random models, at a few seconds a life; every rank is a process of its
own that runs the command. SIGKILL hits one rank at random; the others have to end
by themselves, no launcher helps them. Every second kill waits for a checkpoint that is being written. Prints one table
a number of ranks and exits with 1 where weights or losses differ.
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

import anyres_vlm.train.run  # noqa: F401  # so that no life imports it again
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
LIFE_S = 600  # a life that neither ends nor comes to its kill for so long is stuck
END_S = 120  # in which the ranks that live on have to end
FORK = get_context("fork")  # a life begins with the imports done, in a second


@dataclass(frozen=True)
class Kill:
    """Where one was hit, as its files say afterwards, and what the next life went on from."""

    rank: int
    stage: str
    step: int  # the last one that was finished
    saving: bool
    ended_s: float  # until the other ranks had ended
    resumed: str


def live(words: Sequence[str], launch: dict[str, str], log: Path) -> None:
    """The body of one rank's process."""
    os.environ.update(launch)
    torch.set_num_threads(1)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(main_command(words))


class Lives:
    """The lives of one training run in an output folder, all of its ranks started by hand."""

    def __init__(self, output: Path, ranks: int, settings: Sequence[str], more: Sequence[str]) -> None:
        self.output, self.ranks, self.settings, self.more = output, ranks, settings, more

    def start(self) -> list[BaseProcess]:
        """All ranks of a new life, each speaking into its log."""
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
        """What a rank of the newest life said."""
        return self.output.with_name(f"{self.output.name}-{rank}.log")

    def finish(self) -> None:
        """One life without a disturbance. Raises `RuntimeError` where it fails."""
        for rank, process in enumerate(self.start()):
            process.join(LIFE_S)
            if process.exitcode != 0:
                raise RuntimeError(f"rank {rank} failed: {self.log(rank).read_text()[-2000:]}")

    def resumed(self) -> str:
        """What the newest life went on from."""
        stage = re.search(r"(stage\d): .* parameters trained(?:, resumed after step (\d+))?", self.log(0).read_text())
        return f"{stage[1]} step {stage[2] or 0}" if stage else "-"

    def trains(self, stage: str) -> bool:
        """Whether the newest life has come to a stage: what older ones left there is cut back then."""
        return f"{stage}: " in self.log(0).read_text()

    def finished(self, stage: str) -> int:
        """The last step of a stage that is recorded."""
        path = self.output / stage / METRICS_FILE
        rows = read_metrics(path) if path.exists() else []
        return int(rows[-1]["step"]) if rows else 0

    def saving(self, stage: str) -> list[tuple[Path, int]]:
        """Checkpoints of a stage that are not whole, told apart by inode: a later save begins its folder anew."""
        found = []
        for path in (self.output / stage / "checkpoints").glob(f".{PREFIX}*.partial"):
            with suppress(FileNotFoundError):  # it has just become whole
                found.append((path, path.stat().st_ino))
        return found

    def saves_now(self, stage: str) -> bool:
        """Whether the newest life has such a checkpoint of its own."""
        return bool(set(self.saving(stage)) - self.old_saves[stage])

    def wait_until(self, is_there: Callable[[], bool], process: BaseProcess) -> bool:
        """Whether the moment came before the process ended. Raises `RuntimeError` for one that is stuck."""
        deadline = time.monotonic() + LIFE_S
        while not is_there():
            if not process.is_alive():
                return False
            if time.monotonic() > deadline:
                raise RuntimeError(f"no progress in {LIFE_S} s: {self.log(0).read_text()[-2000:]}")
            time.sleep(0.001)
        return True


def disturbed(lives: Lives, kills: int, steps: dict[str, int], rng: random.Random) -> list[Kill]:
    """Kill a run so many times over both stages, then let it end."""
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
        rank = 0 if wants_save else rng.randrange(lives.ranks)  # which writes; the others do nothing meanwhile
        processes[rank].kill()
        processes[rank].join()
        killed = time.monotonic()
        for process in processes:
            process.join(END_S)
            if process.exitcode is None:
                raise RuntimeError(f"kill {number + 1}: a rank lives on, {END_S} s after the other's end")
        ended_s = time.monotonic() - killed
        now = STAGES[(lives.output / "stage1" / "model").exists() and (lives.output / "stage2").exists()]
        done.append(Kill(rank, now, lives.finished(now), lives.saves_now(now), ended_s, lives.resumed()))
        print(f"kill {number + 1}: {done[-1]}", file=sys.stderr, flush=True)
    lives.finish()
    return done


def write_bases(folder: Path) -> list[str]:
    """Small random base models, for short lives; returns the settings that name them."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer("embedded:tiny-lm")
    shape = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**shape, image_size=28, patch_size=14)).save_pretrained(folder / "vit")
    LlamaForCausalLM(LlamaConfig(**shape, vocab_size=len(tokenizer))).save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    return [f"model.llm={folder}/llm", f"model.encoder.name={folder}/vit"]


def differences(found: Path, expected: Path) -> list[str]:
    """What of two runs is not equal to the bit: weights and losses of both stages."""
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
    """One Markdown table."""
    print(f"\n{ranks} rank{'s' * (ranks > 1)}: {len(kills)} kills in {seconds / 60:.0f} minutes\n")
    print("| kill | life had begun at | rank killed behind | during a save | other ranks ended |")
    print("|---|---|---|---|---|")
    for number, kill in enumerate(kills, start=1):
        others = f"after {kill.ended_s:.1f} s" if ranks > 1 else "-"
        where = f"{kill.rank} {kill.stage} step {kill.step}"
        print(f"| {number} | {kill.resumed} | {where} | {'yes' if kill.saving else 'no'} | {others} |")
    verdict = f"DIFFERENT: {'; '.join(unequal)}" if unequal else "equal to the bit"
    print(f"\nweights and losses of both stages beside an undisturbed run: {verdict}", flush=True)


def main() -> int:
    """Run as the command line says; 1 where a run ended differently."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="for each number of ranks")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--deepspeed", help="a preset; without it every rank has the whole model")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
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
