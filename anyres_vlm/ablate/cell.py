"""One run of a sweep: which variant of each axis, which seed, and the key of everything that decides its weights."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

from anyres_vlm.ablate.sweep import Sweep, Variant
from anyres_vlm.config import RunConfig, StageName, load_config
from anyres_vlm.errors import UsageError
from anyres_vlm.train.options import stage_settings

Choices = Mapping[str, str]
"""By axis the name of the variant."""


@dataclass(frozen=True)
class Cell:
    """A run. `choices` names a variant of every axis, `changed` those that are not the baseline's."""

    choices: Choices
    changed: Choices
    seed: int
    config: RunConfig
    skip_stage1: bool

    @cached_property
    def stage1_key(self) -> str | None:
        """Equal for the cells that start stage 2 from the same stage 1; None without one."""
        return None if self.skip_stage1 else _digest([self._settings("stage1")])

    @cached_property
    def key(self) -> str:
        """Equal for cells whose weights are the same."""
        return _digest([self.stage1_key, self._settings("stage2")])

    @property
    def name(self) -> str:
        """A folder's name that says what is in it."""
        words = "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", f"{axis}_{name}") for axis, name in self.changed.items())
        return f"{words[:80] or 'baseline'}-seed{self.seed}-{self.key}"

    def _settings(self, stage: StageName) -> dict[str, Any]:
        return stage_settings(self.config, stage)


def rows(sweep: Sweep) -> Iterator[Choices]:
    """The combinations of variants, the baseline's first."""
    if sweep.combine == "grid":
        yield from (dict(zip(sweep.axes, names, strict=True)) for names in product(*sweep.axes.values()))
        return
    yield (baseline := _baseline(sweep))
    for axis, variants in sweep.axes.items():
        yield from ({**baseline, axis: name} for name in variants if name != baseline[axis])


def changes(sweep: Sweep, choices: Choices) -> Choices:
    """The choices that are not the baseline's."""
    return {axis: name for axis, name in choices.items() if name != _baseline(sweep)[axis]}


def chosen(sweep: Sweep, choices: Choices) -> list[Variant]:
    """The variants of a row."""
    return [sweep.axes[axis][name] for axis, name in choices.items()]


def row_seeds(sweep: Sweep, choices: Choices) -> list[int]:
    """The seeds of a row: the sweep's, or those of them that all its variants allow."""
    return [seed for seed in sweep.seeds if all(seed in (v.seeds or sweep.seeds) for v in chosen(sweep, choices))]


def expand(sweep: Sweep) -> list[Cell]:
    """All cells, seed by seed, so that whatever is finished first is a whole table of one seed.

    Raises `UsageError` for a configuration that is none, and for two variants that come to the same run.
    """
    cells: dict[str, Cell] = {}
    for seed in sweep.seeds:
        for choices in rows(sweep):
            if seed not in row_seeds(sweep, choices):
                continue
            cell = _cell(sweep, choices, seed)
            if cell.key in cells:
                raise UsageError(f"{_named(cells[cell.key].choices)} and {_named(choices)} are the same run: drop one")
            cells[cell.key] = cell
    return list(cells.values())


def _baseline(sweep: Sweep) -> Choices:
    return {axis: next(iter(variants)) for axis, variants in sweep.axes.items()}


def _cell(sweep: Sweep, choices: Choices, seed: int) -> Cell:
    settings: dict[str, object] = dict(sweep.set)
    for axis, name in choices.items():
        settings |= sweep.axes[axis][name].set
    try:
        config = load_config(sweep.base, flags={**settings, "seed": seed})
    except UsageError as error:
        raise UsageError(f"{_named(choices)}: {error}") from None
    skip_stage1 = any(variant.skip_stage1 for variant in chosen(sweep, choices))
    return Cell(choices, changes(sweep, choices), seed, config, skip_stage1)


def _named(choices: Choices) -> str:
    return ", ".join(f"{axis}={name}" for axis, name in choices.items())


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
