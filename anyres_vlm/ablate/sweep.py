"""The file of `anyres ablate`: what is varied against which base, with which seeds, and what is measured.

`expand` turns a sweep into its cells: one training run for each combination of variants and each seed.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from anyres_vlm.config import Frozen, Positive, RunConfig, load_config, read_mapping, validated
from anyres_vlm.errors import UsageError
from anyres_vlm.train.options import stage_settings

Settings = dict[str, Any]
"""Settings of a run by dotted key."""
Seeds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
Choices = Mapping[str, str]
"""The name of a variant by axis."""


class Published(Frozen):
    """A published effect of the same choice: a benchmark's score with the baseline's variant and with this one."""

    benchmark: str  # its name
    baseline: float  # score with the baseline's variant
    variant: float  # score with this variant
    source: str  # where it is printed

    @property
    def delta(self) -> float:
        """The difference in points of the benchmark."""
        return self.variant - self.baseline


class Variant(Frozen):
    """One value of an axis."""

    set: Settings = Field({})  # of a run, by dotted key, as --set takes them
    skip_stage1: bool = False  # stage 2 on an untrained projector
    seeds: Seeds | None = None  # fewer than the sweep's
    published: tuple[Published, ...] = ()  # effects of the same choice elsewhere
    note: str | None = None  # below the table, such as why nothing is published


class Measure(Frozen):
    """A command of `anyres` that scores a checkpoint, without --model and --json."""

    run: str  # such as `eval heldout`
    # columns by title: a dotted path into the command's JSON, or several, which are averaged
    numbers: Annotated[dict[str, str | Annotated[tuple[str, ...], Field(min_length=1)]], Field(min_length=1)]
    scale: float = 100  # factor of each number
    rendered: Positive | None = None  # held-out questions to render once for --data

    @field_validator("run")
    @classmethod
    def _is_a_command(cls, run: str) -> str:
        if not shlex.split(run):  # raises ValueError for an open quotation
            raise ValueError("expected a command such as probe reading")
        return run


class Sweep(Frozen):
    """A whole sweep. The first variant of each axis is the baseline's."""

    base: Path  # configuration of a run, relative to this file
    set: Settings = Field({})  # in every run, by dotted key
    seeds: Seeds  # of weights, order and images
    # variants by title in axes by title; the first is the baseline's
    axes: Annotated[dict[str, Annotated[dict[str, Variant], Field(min_length=2)]], Field(min_length=1)]
    combine: Literal["one_at_a_time", "grid"] = "one_at_a_time"  # grid: every combination of variants
    measure: Annotated[tuple[Measure, ...], Field(min_length=1)]  # of each model
    launch: str | None = None  # before `anyres train`, such as torchrun --nproc-per-node 8 -m; None is one process

    @model_validator(mode="after")
    def _variants_use_the_seeds_of_the_sweep(self) -> Sweep:
        for axis, variants in self.axes.items():
            for name, variant in variants.items():
                if extra := set(variant.seeds or ()) - set(self.seeds):
                    raise ValueError(
                        f"axes.{axis}.{name}.seeds has {min(extra)}, but the baseline's seeds are {list(self.seeds)}"
                    )
        return self

    @model_validator(mode="after")
    def _titles_differ(self) -> Sweep:
        titles = [title for measure in self.measure for title in measure.numbers]
        if doubled := {title for title in titles if titles.count(title) > 1}:
            raise ValueError(f"numbers: {sorted(doubled)[0]!r} occurs twice")
        return self


@dataclass(frozen=True)
class Cell:
    """One run. `choices` names a variant of every axis, `changed` only those that differ from the baseline."""

    choices: Choices
    changed: Choices
    seed: int
    config: RunConfig
    skip_stage1: bool

    @cached_property
    def stage1_key(self) -> str | None:
        """Equal for cells whose stage 2 starts from the same stage 1; None without stage 1."""
        return None if self.skip_stage1 else _digest([stage_settings(self.config, "stage1")])

    @cached_property
    def key(self) -> str:
        """Equal for cells with the same weights."""
        return _digest([self.stage1_key, stage_settings(self.config, "stage2")])

    @property
    def name(self) -> str:
        """A readable folder name."""
        words = "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", f"{axis}_{name}") for axis, name in self.changed.items())
        return f"{words[:80] or 'baseline'}-seed{self.seed}-{self.key}"


def read_sweep(path: Path) -> Sweep:
    """Read a sweep. Raises `UsageError` with the key, the value and the nearest known key."""
    sweep = validated(Sweep, read_mapping(path), path)
    base = path.parent / sweep.base.expanduser()
    if not base.is_file():
        raise UsageError(
            f"config {path}: base {sweep.base}: no such file in its folder; expected a configuration of a run"
        )
    return sweep.model_copy(update={"base": base})


def expand(sweep: Sweep) -> list[Cell]:
    """Return all cells, seed by seed, so that a table of one seed is complete first.

    Raises `UsageError` for an invalid configuration, and for two combinations that are the same run.
    """
    cells: dict[str, Cell] = {}
    for seed in sweep.seeds:
        for choices in combinations(sweep):
            if seed not in seeds_of(sweep, choices):
                continue
            cell = _cell(sweep, choices, seed)
            if cell.key in cells:
                raise UsageError(f"{_named(cells[cell.key].choices)} and {_named(choices)} are the same run: drop one")
            cells[cell.key] = cell
    return list(cells.values())


def combinations(sweep: Sweep) -> Iterator[Choices]:
    """Yield the combinations of variants, the baseline first."""
    if sweep.combine == "grid":
        yield from (dict(zip(sweep.axes, names, strict=True)) for names in product(*sweep.axes.values()))
        return
    yield (baseline := _baseline(sweep))
    for axis, variants in sweep.axes.items():
        yield from ({**baseline, axis: name} for name in variants if name != baseline[axis])


def changes(sweep: Sweep, choices: Choices) -> Choices:
    """Return the choices that differ from the baseline."""
    return {axis: name for axis, name in choices.items() if name != _baseline(sweep)[axis]}


def variants_of(sweep: Sweep, choices: Choices) -> list[Variant]:
    """Return the variants that are chosen."""
    return [sweep.axes[axis][name] for axis, name in choices.items()]


def seeds_of(sweep: Sweep, choices: Choices) -> list[int]:
    """Return the sweep's seeds that all chosen variants allow."""
    return [seed for seed in sweep.seeds if all(seed in (v.seeds or sweep.seeds) for v in variants_of(sweep, choices))]


def _baseline(sweep: Sweep) -> Choices:
    return {axis: next(iter(variants)) for axis, variants in sweep.axes.items()}


def _cell(sweep: Sweep, choices: Choices, seed: int) -> Cell:
    variants = variants_of(sweep, choices)
    settings: dict[str, object] = dict(sweep.set)
    for variant in variants:
        settings |= variant.set
    try:
        config = load_config(sweep.base, flags={**settings, "seed": seed})
    except UsageError as error:
        raise UsageError(f"{_named(choices)}: {error}") from None
    return Cell(choices, changes(sweep, choices), seed, config, any(variant.skip_stage1 for variant in variants))


def _named(choices: Choices) -> str:
    return ", ".join(f"{axis}={name}" for axis, name in choices.items())


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
