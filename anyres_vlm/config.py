"""The run's configuration: frozen models, one YAML file without inheritance, `--set` on top.

An unknown key fails with the nearest known one; values are validated when the file is loaded.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from anyres_vlm.errors import UsageError, did_you_mean, explain, shortened
from anyres_vlm.files import parse_yaml
from anyres_vlm.geometry import Dialect, Grid, Layout, Tiling, expand_pinpoints

StageName = Literal["stage1", "stage2"]
TemplateName = Literal[
    "plain", "tiny", "vicuna_v1", "llama_2", "mistral", "llama_3", "chatml", "chatml_direct", "chat_template"
]  # `chat_template` is the tokenizer's own
TilingMode = Literal["fast", "exact"]
ImagePosition = Literal["front", "as_is"]
MOST_BYTES = 1 << 18  # of a configuration; PyYAML reads some 100 kB a second
Positive = Annotated[int, Field(ge=1, lt=1 << 63)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(gt=0, le=1)]
Model = TypeVar("Model", bound=BaseModel)


def _read_pinpoints(value: Any) -> Any:
    """Read pinpoints as LLaVA-NeXT's files have them: a list written as text, or a range of tiles."""
    if not isinstance(value, str):
        return value
    try:
        listed = ast.literal_eval(value.strip())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        listed = None
    if isinstance(listed, list | tuple):
        return listed
    expand_pinpoints(value, 1)  # refuses any other text
    return value.strip()


Pinpoints = Annotated[tuple[tuple[Positive, Positive], ...] | str, BeforeValidator(_read_pinpoints)]
"""Pairs of pixels, or a range of tiles such as `(1x1),...,(6x6)`, which the encoder's tile side expands."""


class Frozen(BaseModel):
    """Base of all configuration models: no unknown key, no later change, no number that is none."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class EncoderConfig(Frozen):
    """Vision encoder: a CLIP of transformers or a vision transformer of timm, by hub id, folder or `embedded:` name."""

    kind: Literal["clip", "timm"] = "clip"  # whose: a CLIP of transformers, or a plain vision transformer of timm
    name: str  # hub id, folder, `embedded:` name, or timm's own name
    layer: int | Annotated[tuple[int, ...], Field(min_length=1)] = -2  # several are concatenated in this order
    tile: Positive | None = None  # timm only: tile side in pixels; None is the model's own

    @model_validator(mode="after")
    def _tile_is_timm_s(self) -> EncoderConfig:
        if self.tile is not None and self.kind == "clip":
            raise ValueError(f"tile={self.tile} goes with kind: timm; a clip encoder has its own")
        return self


class ModelConfig(Frozen):
    """What the model is made of and how images are cut for it."""

    llm: str  # causal language model by hub id, folder or `embedded:` name
    encoder: EncoderConfig  # what sees the tiles
    projector: Literal["linear", "mlp2x_gelu"] = "mlp2x_gelu"  # from the encoder's width to the language model's
    template: TemplateName  # how a conversation is written
    grid: str = "2x2"  # largest grid of tiles, ROWSxCOLUMNS; 1x1 is the thumbnail alone
    pinpoints: Pinpoints | None = None  # pairs of pixels, or tiles as (1x1),...,(6x6); replaces `grid`
    layout: Layout = "spatial_unpad"  # flat keeps the tokens of padding
    dialect: Dialect = "hf"  # counts as transformers does, or as the original code

    @model_validator(mode="after")
    def _grid_is_readable(self) -> ModelConfig:
        Grid.parse(self.grid)
        return self

    def tiling(self, tile: int, patch: int) -> Tiling:
        """The tiling for an encoder with this tile and patch side in pixels."""
        if self.pinpoints is not None:
            listed = self.pinpoints if isinstance(self.pinpoints, tuple) else expand_pinpoints(self.pinpoints, tile)
            return Tiling(listed, tile, patch, self.layout, self.dialect)
        return Tiling.from_grid(Grid.parse(self.grid), tile=tile, patch=patch, layout=self.layout, dialect=self.dialect)


class CheckpointConfig(Frozen):
    """A LlavaNext checkpoint to start from, by folder or hub id. What is None is the checkpoint's own."""

    checkpoint: str  # LlavaNext folder or hub id; replaces llm, encoder and projector
    template: TemplateName | None = None
    grid: str | None = None
    pinpoints: Pinpoints | None = None
    layout: Layout | None = None
    dialect: Dialect | None = None

    def apply(self, own: ModelConfig) -> ModelConfig:
        """The checkpoint's own configuration with what is set here; a grid replaces its list of pinpoints."""
        changes = self.model_dump(exclude={"checkpoint"}, exclude_none=True)
        if self.grid is not None:
            changes.setdefault("pinpoints", None)
        return ModelConfig.model_validate(own.model_dump() | changes)


class AugmentConfig(Frozen):
    """Photometric changes that leave text readable and geometry alone. Each happens to a sample with `probability`."""

    color: Annotated[float, Field(ge=0, le=0.4)] = 0.2  # brightness, contrast and saturation, by up to this share
    jpeg_quality: Annotated[int, Field(ge=40, le=100)] = 70  # the lowest that compression uses; 100 is hardly seen
    probability: Annotated[float, Field(ge=0, le=1)] = 0.5  # of each change, for each sample


PictureKind = Literal["scene", "sign", "receipt", "table", "chart", "page"]
"""What the renderer draws."""


class DataConfig(Frozen):
    """A source of any kind (see `open_source`) with its image folder, or so many rendered samples of the default."""

    path: Path | None = None  # JSON, JSONL, Parquet, tar (files, a folder, a pattern) or a YAML mixture
    images: Path | None = None  # image folder; None is the data's own
    rendered: Literal["captions", "instructions", "generated", "academic"] | None = None  # instead of path: drawn
    samples: Positive | None = None  # how many of them
    kinds: Annotated[tuple[PictureKind, ...], Field(min_length=1)] | None = None  # rendered alike often; None: the mix
    index: Path | None = None  # where `anyres index` put it or training shall; None is beside the run
    max_bad_fraction: Fraction = 0.01  # cap on records that are left out
    image_position: ImagePosition = "front"  # moves a question's only <image> to its front, as LLaVA does; as_is: not
    tiling_mode: TilingMode = "fast"  # `exact`: the pixels of transformers' processor, at 1.7 times the cost
    augment: AugmentConfig | None = None  # photometric changes; None is none

    @field_validator("path", "images", "index")
    @classmethod
    def _home(cls, path: Path | None) -> Path | None:
        return None if path is None else path.expanduser()

    @model_validator(mode="after")
    def _one_source(self) -> DataConfig:
        if (self.path is None) == (self.rendered is None):
            raise ValueError("give either `path` (of the data) or `rendered`, not both and not neither")
        if (self.rendered is None) != (self.samples is None):
            raise ValueError("`samples` goes with `rendered`, and `rendered` needs it")
        if self.kinds is not None and self.rendered is None:
            raise ValueError("`kinds` goes with `rendered`: other data comes as it is")
        return self


def _twice_the_rank(settings: dict[str, Any]) -> int:
    return 2 * int(settings.get("rank", 1))  # the rank is missing where it was refused


class LoraSettings(Frozen):
    """Low-rank adapters trained in place of the language model; rank and alpha are those of LLaVA-1.5's LoRA recipe."""

    rank: Positive = 128  # of each adapter
    alpha: Positive = Field(
        default_factory=_twice_the_rank
    )  # scales an adapter by alpha / rank; twice the rank if unset
    dropout: Fraction = 0.0  # on what goes into an adapter
    learning_rate: Rate | None = None  # None is the stage's; LLaVA's is 2e-4 beside the projector's 2e-5
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] | None = None  # None: all linear ones, not the head


class StageConfig(Frozen):
    """One stage of the recipe. `batch_size` counts samples an optimizer step, `capacity` the tokens of a pack."""

    data: DataConfig  # what the stage learns from
    learning_rate: Rate  # highest, after the warm-up
    vision_lr: Rate | None = None  # None keeps the encoder frozen
    lora: LoraSettings | None = None  # stage 2 only; None trains the whole language model
    batch_size: Positive  # samples an optimizer step
    epochs: Positive = 1  # times that every sample is seen
    max_length: Positive = 4096  # tokens of the longest sample; longer ones are rejects
    capacity: Positive = 16384  # tokens of a pack
    packs_per_step: Positive | None = None  # None follows from batch_size
    warmup_ratio: Fraction = 0.03  # share of the steps in which the rate rises from 0
    eta_min: Annotated[float, Field(ge=0)] = 0.0  # rate at the end of the cosine
    weight_decay: Annotated[float, Field(ge=0)] = 0.0  # AdamW's
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0  # gradients are clipped to it
    template: TemplateName | None = None  # None is the model's; stage 1 of LLaVA uses `plain`
    activation_checkpointing: bool = False  # recompute activations: less memory, more time
    deepspeed: str | None = None  # a shipped preset such as zero2, or a JSON file; None is one whole model a rank

    @model_validator(mode="after")
    def _pack_holds_a_sample(self) -> StageConfig:
        if self.capacity < self.max_length:
            raise ValueError(
                f"capacity={self.capacity} is below max_length={self.max_length}: raise it or lower max_length"
            )
        return self


class CacheConfig(Frozen):
    """Where features of the frozen encoder are kept, and how many bytes of them (10^9 a GB) over all encoders."""

    folder: Path  # shared by runs and encoders
    max_gb: Annotated[float, Field(gt=0)] = 50.0  # of all that it holds

    @model_validator(mode="before")
    @classmethod
    def _folder_alone(cls, content: Any) -> Any:
        return {"folder": content} if isinstance(content, str) else content

    @field_validator("folder")
    @classmethod
    def _home(cls, folder: Path) -> Path:
        return folder.expanduser()


class RunConfig(Frozen):
    """A whole two-stage run."""

    model: ModelConfig | CheckpointConfig  # base models, or a checkpoint
    stage1: StageConfig  # feature alignment: trains the projector
    stage2: StageConfig  # visual instruction tuning: trains the language model, too
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] = 0  # of everything that is drawn
    precision: Literal["fp32", "bf16"] = "bf16"  # of the computation; weights and moments are fp32
    workers: Annotated[int, Field(ge=0)] = 0  # loader processes
    trackers: tuple[Literal["wandb", "trackio"], ...] = ()  # beside TensorBoard, which always writes
    cache_features: CacheConfig | None = None  # a folder or a section; None encodes every tile anew
    save_every: Positive = 500  # optimizer steps between checkpoints
    save_minutes: Annotated[float, Field(gt=0)] | None = None  # and minutes at most
    keep_checkpoints: Positive = 2  # the newest so many
    rank_timeout_minutes: Annotated[float, Field(gt=0)] = 30.0  # that others wait for one; rank 0 may index that long
    max_skipped_steps: Annotated[int, Field(ge=0)] = 10  # whose loss or gradient is not finite

    @model_validator(mode="after")
    def _lora_is_stage_2_s(self) -> RunConfig:
        if self.stage1.lora is not None:
            raise ValueError("stage1.lora: stage 1 leaves the language model as it is; put lora under stage2")
        return self

    @model_validator(mode="after")
    def _cached_encoder_is_frozen(self) -> RunConfig:
        for stage in get_args(StageName):
            rate = self.stage(stage).vision_lr
            if self.cache_features is not None and rate is not None:
                raise ValueError(f"{stage}.vision_lr={rate:g} trains the encoder: it goes without cache_features")
        return self

    def stage(self, name: StageName) -> StageConfig:
        """The settings of one stage."""
        return self.stage1 if name == "stage1" else self.stage2


class _FromBases(RunConfig):
    model: ModelConfig


class _FromCheckpoint(RunConfig):
    model: CheckpointConfig


def shipped_config(name: str) -> Path:
    """A configuration that comes with the package: inside it once installed, beside it in a clone."""
    package = Path(__file__).parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / f"{name}.yaml").exists():
            return folder / f"{name}.yaml"
    raise UsageError(f"no shipped configuration {name!r}")


def load_config(path: Path, overrides: Sequence[str] = (), flags: Mapping[str, object] | None = None) -> RunConfig:
    """Read a YAML file, apply `key.sub=value` overrides, then flags by dotted key.

    Raises `UsageError` naming the file, the key, what was got and the nearest known key.
    """
    content = read_mapping(path)
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise UsageError(
                f"--set {shortened(override)}: expected key=value, for example --set stage2.learning_rate=1e-5"
            )
        try:
            parsed = parse_yaml(value)
        except ValueError as error:
            raise UsageError(f"--set {shortened(override)}: the value is not YAML: {error}") from None
        _assign(content, key.strip(), parsed)
    for key, flag in (flags or {}).items():
        _assign(content, key, flag)
    # Not left to the union, whose messages name the keys of both.
    model = content.get("model")
    kind = _FromCheckpoint if isinstance(model, dict) and "checkpoint" in model else _FromBases
    return validated(kind, content, path)


def tiling_flags(grid: str | None, layout: str | None, dialect: str | None) -> dict[str, object]:
    """Command-line flags for `load_config`; a grid given there replaces the file's own list of pinpoints."""
    given = {"model.grid": grid, "model.layout": layout, "model.dialect": dialect}
    flags: dict[str, object] = {key: value for key, value in given.items() if value is not None}
    return flags if grid is None else {**flags, "model.pinpoints": None}


def template_name(text: str | None) -> TemplateName | None:
    """A template named on the command line. Raises `UsageError` for a name that is none."""
    names = get_args(TemplateName)
    if text is not None and text not in names:
        raise UsageError(f"--template {text!r}: expected one of {', '.join(names)}{did_you_mean(text, names)}")
    return cast(TemplateName | None, text)


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML file of keys. Raises `UsageError` for any other."""
    try:
        with path.open("rb") as stream:
            text = stream.read(MOST_BYTES + 1)  # never ending ones, too
        if len(text) > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES:,} bytes")
        content = parse_yaml(text.decode("utf-8"))
    except FileNotFoundError:
        raise UsageError(f"config {path}: no such file; shipped ones are in configs/") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"config {path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UsageError(f"config {path}: expected a mapping of keys, got {type(content).__name__}")
    return content


def validated(model: type[Model], content: dict[str, Any], path: Path) -> Model:
    """The model of a file's content. Raises `UsageError` naming the key, what was got and the nearest known key."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise UsageError(f"config {path}: {explain(error, model)}") from None


def _assign(content: dict[str, Any], key: str, value: object) -> None:
    *parents, last = key.split(".")
    node: Any = content
    for parent in parents:
        if node.get(parent) is None:  # not there, or written out as null
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise UsageError(f"--set {key}: {parent} is a value, not a section")
    node[last] = value
