"""Configuration of a run: one complete YAML file, validated on load into frozen models, with `--set` overrides.

An unknown key is an error that suggests the nearest known one. The comment on each field is its description in
configs/REFERENCE.md, which tools/reference.py writes.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from anyres_vlm.errors import UsageError, did_you_mean, explain, shortened
from anyres_vlm.files import parse_yaml
from anyres_vlm.geometry import Dialect, Grid, Layout, Tiling, expand_pinpoints

StageName = Literal["stage1", "stage2"]
STAGES: tuple[StageName, ...] = get_args(StageName)
TemplateName = Literal[
    "plain", "tiny", "vicuna_v1", "llama_2", "mistral", "llama_3", "chatml", "chatml_direct", "chat_template"
]  # `chat_template` is the tokenizer's own
TilingMode = Literal["fast", "exact"]
ImagePosition = Literal["front", "as_is"]
PictureKind = Literal["scene", "sign", "receipt", "table", "chart", "page"]  # kinds of rendered images
MOST_BYTES = 1 << 18  # of a configuration file; PyYAML parses about 100 kB/s
Positive = Annotated[int, Field(ge=1, lt=1 << 63)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(gt=0, le=1)]
UserPath = Annotated[Path, AfterValidator(Path.expanduser)]
Model = TypeVar("Model", bound=BaseModel)


def _read_pinpoints(value: Any) -> Any:
    """Accept the text forms of pinpoints in LLaVA-NeXT's files: a list as a string, or a range of tiles."""
    if not isinstance(value, str):
        return value
    try:
        listed = ast.literal_eval(value.strip())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        listed = None
    if isinstance(listed, list | tuple):
        return listed
    expand_pinpoints(value, 1)  # raises for any other text
    return value.strip()


Pinpoints = Annotated[tuple[tuple[Positive, Positive], ...] | str, BeforeValidator(_read_pinpoints)]
"""Pairs of pixels, or a range of tiles such as `(1x1),...,(6x6)`, which is expanded once the tile side is known."""


class Frozen(BaseModel):
    """Base of all configuration models: immutable, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class EncoderConfig(Frozen):
    """The vision encoder."""

    kind: Literal["clip", "timm"] = "clip"  # a CLIP model of transformers, or a plain vision transformer of timm
    name: str  # hub id, folder, `embedded:` name, or name of a timm model
    layer: int | Annotated[tuple[int, ...], Field(min_length=1)] = -2  # hidden state to use; those of a list are joined
    tile: Positive | None = None  # timm only: tile side in pixels; null: the model's image size

    @model_validator(mode="after")
    def _validate_tile_for_timm(self) -> EncoderConfig:
        if self.tile is not None and self.kind == "clip":
            raise ValueError(f"tile={self.tile} requires kind: timm; the tile side of a clip encoder is fixed")
        return self


class ModelConfig(Frozen):
    """The base models, and how images are tiled."""

    llm: str  # causal language model: hub id, folder or `embedded:` name
    encoder: EncoderConfig  # vision encoder
    projector: Literal["linear", "mlp2x_gelu"] = "mlp2x_gelu"  # maps image features to the language model's width
    template: TemplateName  # chat template; `chat_template` is the tokenizer's own
    grid: str = "2x2"  # largest grid of tiles, ROWSxCOLUMNS; 1x1: the thumbnail only
    pinpoints: Pinpoints | None = None  # candidate canvases in pixels, or in tiles as (1x1),...,(6x6); replaces `grid`
    layout: Layout = "spatial_unpad"  # `spatial_unpad` drops padding tokens and adds newlines; `flat` keeps all tiles
    dialect: Dialect = "hf"  # tile as transformers (`hf`) or as the original LLaVA-NeXT code (`llava`)

    @model_validator(mode="after")
    def _validate_grid(self) -> ModelConfig:
        Grid.parse(self.grid)
        return self

    def tiling(self, tile: int, patch: int) -> Tiling:
        """Return the tiling for an encoder with this tile and patch side in pixels."""
        if self.pinpoints is not None:
            listed = self.pinpoints if isinstance(self.pinpoints, tuple) else expand_pinpoints(self.pinpoints, tile)
            return Tiling(listed, tile, patch, self.layout, self.dialect)
        return Tiling.from_grid(Grid.parse(self.grid), tile=tile, patch=patch, layout=self.layout, dialect=self.dialect)


class CheckpointConfig(Frozen):
    """A LlavaNext checkpoint to start from, instead of base models. Keys that are null keep the checkpoint's values."""

    checkpoint: str  # folder or hub id of a LlavaNext checkpoint; replaces `llm`, `encoder` and `projector`
    template: TemplateName | None = None
    grid: str | None = None
    pinpoints: Pinpoints | None = None
    layout: Layout | None = None
    dialect: Dialect | None = None

    def apply(self, own: ModelConfig) -> ModelConfig:
        """Return the checkpoint's configuration with the keys set here; a grid replaces its pinpoints."""
        changes = self.model_dump(exclude={"checkpoint"}, exclude_none=True)
        if self.grid is not None:
            changes.setdefault("pinpoints", None)
        return ModelConfig.model_validate(own.model_dump() | changes)


class AugmentConfig(Frozen):
    """Photometric augmentation. Text stays readable and geometry does not change."""

    color: Annotated[float, Field(ge=0, le=0.4)] = 0.2  # largest relative change of brightness, contrast and saturation
    jpeg_quality: Annotated[int, Field(ge=40, le=100)] = 70  # lowest quality of JPEG compression; 100: nearly lossless
    probability: Annotated[float, Field(ge=0, le=1)] = 0.5  # of the change of colour and of compression, per image


class DataConfig(Frozen):
    """Training data: a source with its image folder, or samples rendered by the package."""

    path: UserPath | None = None  # JSON, JSON Lines, Parquet or tar (a file, folder or pattern), or a YAML mixture
    images: UserPath | None = None  # image folder; null: the folder of the data file
    # instead of `path`: set of samples to render
    rendered: Literal["captions", "instructions", "generated", "academic"] | None = None
    samples: Positive | None = None  # number of samples to render
    # kinds of images to render, equally often; null: all kinds, in the set's own proportions
    kinds: Annotated[tuple[PictureKind, ...], Field(min_length=1)] | None = None
    index: UserPath | None = None  # index file to use, built if it is missing; null: in the run's folder
    max_bad_fraction: Fraction = 0.01  # largest share of records that may be left out because they are bad
    image_position: ImagePosition = "front"  # `front` moves a question's only <image> to its start, as LLaVA does
    tiling_mode: TilingMode = "fast"  # `exact` gives the pixels of transformers' processor, at 1.7 times the cost
    augment: AugmentConfig | None = None  # photometric augmentation; null: none

    @model_validator(mode="after")
    def _validate_one_source(self) -> DataConfig:
        if (self.path is None) == (self.rendered is None):
            raise ValueError("expected either `path` (of the data) or `rendered`, got both or neither: keep one")
        if (self.rendered is None) != (self.samples is None):
            raise ValueError("`rendered` and `samples` must be given together")
        if self.kinds is not None and self.rendered is None:
            raise ValueError("`kinds` requires `rendered`: it does not filter other data")
        return self


def _twice_the_rank(settings: dict[str, Any]) -> int:
    return 2 * int(settings.get("rank", 1))  # an invalid rank is missing here, and reported on its own


class LoraSettings(Frozen):
    """LoRA adapters, trained instead of the whole language model. The defaults are those of LLaVA-1.5's LoRA recipe."""

    rank: Positive = 128  # rank of each adapter
    # the output of an adapter is scaled by alpha / rank; twice the rank if unset
    alpha: Positive = Field(default_factory=_twice_the_rank)
    dropout: Fraction = 0.0  # dropout on the input of each adapter
    learning_rate: Rate | None = None  # of the adapters; null: the stage's. LLaVA: 2e-4, with 2e-5 for the projector
    # names of the layers to adapt; null: all linear layers except the head
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    # QLoRA: hold the frozen layers of the language model in 4 bits (needs the extra `quantize`); null: as loaded
    quantize: Literal["nf4"] | None = None


class StageConfig(Frozen):
    """One stage of the recipe."""

    data: DataConfig  # training data
    learning_rate: Rate  # peak learning rate, after the warm-up
    vision_lr: Rate | None = None  # learning rate of the vision encoder; null: the encoder is frozen
    lora: LoraSettings | None = None  # stage 2 only; null: the whole language model is trained
    batch_size: Positive  # samples per optimizer step
    epochs: Positive = 1  # passes over the data
    max_length: Positive = 4096  # tokens of the longest accepted sample; longer ones are rejected
    capacity: Positive = 16384  # tokens of a pack; at least max_length
    packs_per_step: Positive | None = None  # packs per optimizer step, over all ranks; null: derived from batch_size
    warmup_ratio: Fraction = 0.03  # share of the steps with linear warm-up
    eta_min: Annotated[float, Field(ge=0)] = 0.0  # learning rate at the end of the cosine schedule
    weight_decay: Annotated[float, Field(ge=0)] = 0.0  # weight decay of AdamW
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0  # gradients are clipped to this norm
    template: TemplateName | None = None  # chat template; null: the model's. Stage 1 of LLaVA uses `plain`
    # recompute activations in the backward pass, of all layers or of every n-th: less memory, more time
    activation_checkpointing: bool | Positive = False
    deepspeed: str | None = None  # preset such as zero2, or a JSON file; null: every rank holds the whole model

    @model_validator(mode="after")
    def _validate_capacity(self) -> StageConfig:
        if self.capacity < self.max_length:
            raise ValueError(
                f"capacity={self.capacity} is below max_length={self.max_length}: raise it or lower max_length"
            )
        return self

    @property
    def is_quantized(self) -> bool:
        """Whether adapters are trained on a language model with quantised layers."""
        return self.lora is not None and self.lora.quantize is not None


class CacheConfig(Frozen):
    """A cache on disk for the features of the frozen encoder. A plain path sets `folder`."""

    folder: UserPath  # may be shared by runs and by encoders
    max_gb: Annotated[float, Field(gt=0)] = 50.0  # limit on the size of the whole folder, in 10^9 bytes

    @model_validator(mode="before")
    @classmethod
    def _accept_path(cls, content: Any) -> Any:
        return {"folder": content} if isinstance(content, str) else content


class RunConfig(Frozen):
    """A run of both stages."""

    model: ModelConfig | CheckpointConfig  # base models, or a checkpoint to start from
    stage1: StageConfig  # feature alignment: trains the projector
    stage2: StageConfig  # visual instruction tuning: trains the projector and the language model
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] = 0  # seed of all random numbers
    precision: Literal["fp32", "bf16"] = "bf16"  # of the computation; weights and optimizer state are fp32
    # of RMSNorm, rotary embedding and SwiGLU: transformers' own, Liger's (extra `liger`, GPU only), or torch.compile's
    kernels: Literal["none", "liger", "compile"] = "none"
    workers: Annotated[int, Field(ge=0)] = 0  # data loader processes per rank
    trackers: tuple[Literal["wandb", "trackio"], ...] = ()  # in addition to TensorBoard, which is always written
    cache_features: CacheConfig | None = None  # folder or section; null: no cache, tiles are encoded in every epoch
    save_every: Positive = 500  # optimizer steps between checkpoints
    save_minutes: Annotated[float, Field(gt=0)] | None = None  # also save after this many minutes; null: by steps only
    keep_checkpoints: Positive = 2  # number of newest checkpoints to keep
    rank_timeout_minutes: Annotated[float, Field(gt=0)] = 30.0  # collective timeout; also limits indexing on rank 0
    max_skipped_steps: Annotated[int, Field(ge=0)] = 10  # steps to skip for a NaN or infinite loss or gradient

    @model_validator(mode="after")
    def _validate_lora_stage(self) -> RunConfig:
        if self.stage1.lora is not None:
            raise ValueError("stage1.lora: stage 1 does not train the language model; put lora under stage2")
        return self

    @model_validator(mode="after")
    def _validate_cached_encoder_is_frozen(self) -> RunConfig:
        for stage in STAGES:
            rate = self.stage(stage).vision_lr
            if self.cache_features is not None and rate is not None:
                raise ValueError(f"{stage}.vision_lr={rate:g} trains the encoder: remove it or cache_features")
        return self

    def stage(self, name: StageName) -> StageConfig:
        """Return the settings of one stage."""
        return self.stage1 if name == "stage1" else self.stage2


class _FromBases(RunConfig):
    model: ModelConfig


class _FromCheckpoint(RunConfig):
    model: CheckpointConfig


def load_config(path: Path, overrides: Sequence[str] = (), flags: Mapping[str, object] | None = None) -> RunConfig:
    """Read a YAML file, then apply overrides (each `key.sub=value`) and flags (by dotted key).

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
    # Chosen here, because the error messages of a union mix the keys of both models.
    model = content.get("model")
    kind = _FromCheckpoint if isinstance(model, dict) and "checkpoint" in model else _FromBases
    return validated(kind, content, path)


def _assign(content: dict[str, Any], key: str, value: object) -> None:
    """Set a dotted key, adding sections as needed. Raises `UsageError` if a part of the key is not a section."""
    *parents, last = key.split(".")
    node: Any = content
    for parent in parents:
        if node.get(parent) is None:  # missing, or null in the file
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise UsageError(f"--set {key}: {parent} is a value, not a section")
    node[last] = value


def shipped_config(name: str) -> Path:
    """Return the path of a configuration shipped with the package. Raises `UsageError` for an unknown name."""
    package = Path(__file__).parent
    for folder in (package / "configs", package.parent / "configs"):  # installed, or in a clone
        if (folder / f"{name}.yaml").exists():
            return folder / f"{name}.yaml"
    raise UsageError(f"no shipped configuration {name!r}")


def tiling_flags(grid: str | None, layout: str | None, dialect: str | None) -> dict[str, object]:
    """Return command-line flags for `load_config`; a grid replaces the pinpoints of the file."""
    given = {"model.grid": grid, "model.layout": layout, "model.dialect": dialect}
    flags: dict[str, object] = {key: value for key, value in given.items() if value is not None}
    return flags if grid is None else {**flags, "model.pinpoints": None}


def template_name(text: str | None) -> TemplateName | None:
    """Check the name of a template given on the command line. Raises `UsageError` for an unknown one."""
    names = get_args(TemplateName)
    if text is not None and text not in names:
        raise UsageError(f"--template {text!r}: expected one of {', '.join(names)}{did_you_mean(text, names)}")
    return cast(TemplateName | None, text)


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file with a mapping of keys. Raises `UsageError` if it is missing, too large or anything else."""
    try:
        with path.open("rb") as stream:
            text = stream.read(MOST_BYTES + 1)  # limited: a pipe or device may never end
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
    """Validate the content of a file. Raises `UsageError` naming the key, what was got and the nearest known key."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise UsageError(f"config {path}: {explain(error, model)}") from None
