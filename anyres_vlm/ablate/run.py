"""The jobs of a sweep: each stage 1 once for all cells that need it, then each cell's stage 2 and its measures.

Everything runs as the commands that a user would type, in processes of their own: memory, devices and crashes are those
of one cell, and a launcher may spread it over ranks.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml

from anyres_vlm.ablate.cell import Cell
from anyres_vlm.ablate.claim import claim
from anyres_vlm.ablate.command import POLL_S, run_command
from anyres_vlm.ablate.jobs import Job
from anyres_vlm.ablate.result import measure_key, numbers, read_scores, write_scores
from anyres_vlm.ablate.sweep import Measure, Sweep
from anyres_vlm.config import PictureKind, StageName
from anyres_vlm.errors import DataError, Interrupted
from anyres_vlm.synthetic.dataset import DATA_FILE, Purpose, write_dataset
from anyres_vlm.train.options import CONFIG_FILE, model_folder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SweepRun:
    """A sweep and the folder of its results."""

    sweep: Sweep
    out: Path
    is_signalled: Callable[[], bool] = lambda: False

    def folder(self, cell: Cell) -> Path:
        """Where a cell lies, also one that was made before an axis was renamed or added."""
        return next((self.out / "cells").glob(f"*-{cell.key}"), self.out / "cells" / cell.name)

    def jobs(self, cells: Sequence[Cell]) -> list[Job]:
        """A cell's job needs that of its stage 1."""
        first: dict[str, Job] = {}
        jobs: list[Job] = []
        for cell in cells:
            if cell.stage1_key is not None and cell.stage1_key not in first:
                first[cell.stage1_key] = job = self._stage1(cell, self.out / "stage1" / cell.stage1_key)
                jobs.append(job)
            needs = (first[cell.stage1_key],) if cell.stage1_key is not None else ()
            jobs.append(Job(self.folder(cell), partial(self._is_finished, cell), partial(self._finish, cell), needs))
        return jobs

    def pause(self) -> None:
        """Wait a moment. Raises `Interrupted` after a signal."""
        if self.is_signalled():
            raise Interrupted("all that was finished is kept: the same command goes on")
        time.sleep(POLL_S)

    def _stage1(self, cell: Cell, folder: Path) -> Job:
        return Job(folder, model_folder(folder, "stage1").is_dir, partial(self._train, cell, "stage1", folder))

    def _is_finished(self, cell: Cell) -> bool:
        scores = read_scores(self.folder(cell))
        return all(measure_key(measure) in scores for measure in self.sweep.measure)

    def _finish(self, cell: Cell, lock: int) -> None:
        folder = self.folder(cell)
        if cell.stage1_key is not None:
            _link(folder / "stage1", self.out / "stage1" / cell.stage1_key / "stage1")
        self._train(cell, "stage2", folder, lock)
        scores = read_scores(folder)
        about = {"choices": dict(cell.choices), "seed": cell.seed, "key": cell.key, "stage1": cell.stage1_key}
        found: dict[str, float | None] = {}
        for measure in self.sweep.measure:
            key = measure_key(measure)
            if key not in scores:
                scores[key] = self._measure(measure, folder, lock)
            found |= numbers(measure, scores[key])  # a path that is none shows with the first cell
            write_scores(folder, about, scores)
        shown = ", ".join(f"{title} {'-' if value is None else format(value, '.1f')}" for title, value in found.items())
        logger.info("%s: %s", folder.name, shown)

    def _train(self, cell: Cell, stage: StageName, folder: Path, lock: int) -> None:
        data = cell.config.stage(stage).data
        if data.rendered is not None and data.samples is not None:
            _link(folder / "data" / data.rendered, self._rendered(data.rendered, data.samples, cell.seed, data.kinds))
        config = folder / CONFIG_FILE
        config.write_text(yaml.safe_dump(cell.config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
        words = ["train", "--config", str(config), "--output", str(folder), "--stage", stage.removeprefix("stage")]
        begin = time.monotonic()
        self._anyres([*words, *(["--skip-stage1"] if cell.skip_stage1 else [])], self.sweep.launch, folder, lock)
        logger.info("%s: %s in %.0f s", folder.name, stage, time.monotonic() - begin)
        shutil.rmtree(folder / stage / "checkpoints", ignore_errors=True)  # a finished stage needs them no more

    def _measure(self, measure: Measure, folder: Path, lock: int) -> object:
        words = [*shlex.split(measure.run), "--model", str(model_folder(folder, "stage2")), "--json"]
        if measure.rendered is not None:
            words += ["--data", str(self._rendered("heldout", measure.rendered, 0) / DATA_FILE)]
        text = self._anyres(words, None, folder, lock)
        try:
            return json.loads(text)
        except ValueError:
            raise DataError(f"anyres {measure.run} printed no JSON: {text[:200]!r}") from None

    def _rendered(self, purpose: Purpose, count: int, seed: int, kinds: tuple[PictureKind, ...] | None = None) -> Path:
        """Rendered data, shared by the cells."""
        folder = self.out / "data" / "-".join([purpose, *(kinds or ()), str(count), f"seed{seed}"])
        with claim(folder.with_name(f".{folder.name}.claim"), wait=True):
            write_dataset(folder, purpose, count, seed, kinds)
        return folder

    def _anyres(self, words: Sequence[str], launch: str | None, folder: Path, lock: int) -> str:
        return run_command(words, folder, lock, launch, self.is_signalled)


def _link(link: Path, target: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(os.path.relpath(target, link.parent))
