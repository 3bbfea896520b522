"""The file of `anyres ablate`: what is varied against which base, how often, and what is measured of each model."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from anyres_vlm.config import Frozen, Positive, read_mapping, validated
from anyres_vlm.errors import UsageError

Settings = dict[str, Any]
"""Of a run's configuration, by dotted key."""
Seeds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]


class Published(Frozen):
    """What a choice did elsewhere: a benchmark's score with the baseline's choice and with the variant's."""

    benchmark: str  # its name
    baseline: float  # score with the baseline's choice
    variant: float  # score with this one
    source: str  # where it is printed

    @property
    def delta(self) -> float:
        """In the benchmark's own points."""
        return self.variant - self.baseline


class Variant(Frozen):
    """One value of an axis. `seeds` are fewer than the sweep's, if any."""

    set: Settings = Field({})  # of a run, by dotted key, as --set takes them
    skip_stage1: bool = False  # stage 2 on an untrained projector
    seeds: Seeds | None = None  # fewer than the sweep's
    published: tuple[Published, ...] = ()  # what the same choice did elsewhere
    note: str | None = None  # below the table, such as why nothing is published


class Measure(Frozen):
    """A command of `anyres` that scores a checkpoint, without --model and --json.

    `numbers` are columns of the table: by title a dotted path into the command's JSON, or several, whose mean it is;
    each times `scale`. With `rendered`, so many held-out questions are drawn once and become --data.
    """

    run: str  # such as `eval heldout`
    # columns by title: a dotted path into the command's JSON, or several
    numbers: Annotated[dict[str, str | Annotated[tuple[str, ...], Field(min_length=1)]], Field(min_length=1)]
    scale: float = 100  # times each number
    rendered: Positive | None = None  # questions to draw for --data

    @field_validator("run")
    @classmethod
    def _is_a_command(cls, run: str) -> str:
        if not shlex.split(run):  # raises ValueError for an open quotation
            raise ValueError("expected a command such as probe reading")
        return run


class Sweep(Frozen):
    """A whole sweep. The first variant of each axis is the baseline's; relative to this file lies `base` alone."""

    base: Path  # a run's configuration, beside this file
    set: Settings = Field({})  # in every run, by dotted key
    seeds: Seeds  # of weights, order and pictures
    # variants by title in axes by title; the first is the baseline's
    axes: Annotated[dict[str, Annotated[dict[str, Variant], Field(min_length=2)]], Field(min_length=1)]
    combine: Literal["one_at_a_time", "grid"] = "one_at_a_time"  # grid: every combination of variants
    measure: Annotated[tuple[Measure, ...], Field(min_length=1)]  # of each model
    launch: str | None = None  # before `anyres train`, such as torchrun --nproc-per-node 8 -m; None is one process

    @model_validator(mode="after")
    def _seeds_are_the_sweep_s(self) -> Sweep:
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
            raise ValueError(f"numbers: {sorted(doubled)[0]!r} is there twice")
        return self


def read_sweep(path: Path) -> Sweep:
    """The sweep of a YAML file. Raises `UsageError` naming the key, what was got and the nearest known key."""
    sweep = validated(Sweep, read_mapping(path), path)
    base = path.parent / sweep.base.expanduser()
    if not base.is_file():
        raise UsageError(f"config {path}: base {sweep.base}: no such file beside it; expected a configuration of a run")
    return sweep.model_copy(update={"base": base})
