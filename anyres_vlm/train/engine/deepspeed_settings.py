"""Read a DeepSpeed JSON file as people have them, and resolve it against the run's own configuration.

Every top-level key has one treatment, named in `TREATMENTS`:

- `run`: the run's configuration decides. "auto" and an absent key take its value, an equal value is accepted, any other
  is an error, because using either one silently would be wrong.
- `engine`: the training engine decides. Another value is replaced with a warning; results do not depend on it.
- `passed`: DeepSpeed gets the value; "auto" means DeepSpeed's default.
- `unused`: the run has its own setting for the same purpose. Dropped, with a warning where it was switched on.
- `refused`: changes what is trained in a way this trainer does not support. An error where it is switched on.
- `block`: a section whose keys are treated one by one in the function of that name below.

A key that is not in the table is a typing error if it resembles one (an error), and otherwise ignored with a warning.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from anyres_vlm.config import RunConfig, StageConfig, StageName, shipped_config
from anyres_vlm.errors import UsageError, did_you_mean, shortened

AUTO = "auto"
Treatment = Literal["run", "engine", "passed", "unused", "refused", "block"]
TREATMENTS: dict[str, Treatment] = {
    "train_batch_size": "run",  # samples an optimizer step: the stage's batch_size
    "gradient_clipping": "run",  # max_grad_norm
    "gradient_allreduce_op": "run",  # the loss is scaled for a mean over the ranks
    "train_micro_batch_size_per_gpu": "engine",  # a micro-batch is one pack
    "gradient_accumulation_steps": "engine",  # a step's packs are counted by the engine
    "zero_allow_untested_optimizer": "engine",
    "zero_force_ds_cpu_optimizer": "engine",  # the optimizer is torch's AdamW, offloaded or not
    "bf16": "block",
    "bfloat16": "block",  # an older name of bf16
    "data_types": "block",
    "communication_data_type": "block",
    "optimizer": "block",
    "scheduler": "block",
    "zero_optimization": "block",
    "activation_checkpointing": "unused",  # the run's activation_checkpointing
    "flops_profiler": "unused",  # metrics.jsonl has tokens/s and MFU
    "compile": "unused",
    "dataloader_drop_last": "unused",
    "fp16": "refused",
    "fp8": "refused",
    "amp": "refused",
    "torch_autocast": "refused",
    "autotuning": "refused",
    "compression_training": "refused",
    "curriculum_learning": "refused",
    "data_efficiency": "refused",
    "eigenvalue": "refused",
    "elasticity": "refused",
    "expert_parallel": "refused",
    "hybrid_engine": "refused",
    "pipeline": "refused",
    "progressive_layer_drop": "refused",
    "quantize_training": "refused",
    "sequence_parallel_size": "refused",
    "sparse_attention": "refused",
    "sparse_gradients": "refused",
    "tensor_parallel": "refused",
    "weight_quantization": "refused",
    "aio": "passed",
    "checkpoint": "passed",
    "comet": "passed",
    "comms_config": "passed",
    "comms_logger": "passed",
    "csv_monitor": "passed",
    "disable_allgather": "passed",
    "disable_python_gc": "passed",
    "dump_state": "passed",
    "gradient_predivide_factor": "passed",
    "log_level": "passed",
    "memory_breakdown": "passed",
    "monitor_config": "passed",
    "nebula": "passed",
    "prescale_gradients": "passed",
    "seq_parallel_communication_data_type": "passed",
    "steps_per_print": "passed",
    "tensorboard": "passed",
    "timers": "passed",
    "wall_clock_breakdown": "passed",
    "wandb": "passed",
}
ENGINE_VALUES = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
QUIET = 1_000_000_000  # steps between DeepSpeed's own log lines, where the file does not say
# Bucket sizes that "auto" takes from the model's width, by the rule of transformers: elements as a function of it.
SIZES = {
    "reduce_bucket_size": lambda width: width * width,
    "stage3_prefetch_bucket_size": lambda width: width * width * 9 // 10,
    "stage3_param_persistence_threshold": lambda width: width * 10,
}
ADAMW = {"betas": [0.9, 0.999], "eps": 1e-8, "amsgrad": False, "bias_correction": True, "adam_w_mode": True}
SPEED_ONLY = {"fused", "torch_adam", "foreach", "legacy_fusion", "fp32_optimizer_states"}  # of AdamW: same updates
SCHEDULERS = ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR")


@dataclass(frozen=True)
class DeepSpeedSettings:
    """The settings that DeepSpeed gets for one stage; `warnings` are lines about what of the file is not used."""

    path: Path
    content: dict[str, Any]
    warnings: tuple[str, ...]

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage; at 0 nothing is split and the plain backend trains."""
        return int(self.content["zero_optimization"]["stage"])

    def sized(self, width: int) -> dict[str, Any]:
        """Return the content with bucket sizes of "auto" for a language model of this hidden size."""
        return {**self.content, "zero_optimization": fill_sizes(self.content["zero_optimization"], width)}


def find_preset(name: str) -> Path:
    """Find settings by the name of a shipped preset or by path. Raises `UsageError` where there are none."""
    presets = shipped_config("tiny").parent / "deepspeed"
    for path in (presets / f"{name}.json", Path(name).expanduser()):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in presets.glob("*.json")))
    near = did_you_mean(name, known.split(", "))
    raise UsageError(f"--deepspeed {name}: expected a JSON file or one of {known}{near}")


def read_preset(path: Path) -> dict[str, Any]:
    """Read a file as it is written. Raises `UsageError` unless it is a JSON object without repeated keys."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_without_repeats)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"--deepspeed {path}: cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"--deepspeed {path}: expected a JSON object, got {type(content).__name__}")
    return content


def read_zero(path: Path, width: int | None = None) -> dict[str, Any]:
    """Return a file's `zero_optimization`, "auto" filled in or left to DeepSpeed's default."""
    return fill_sizes(_Resolver(path, None, None).zero(read_preset(path).get("zero_optimization", AUTO)), width)


def fill_sizes(zero: dict[str, Any], width: int | None) -> dict[str, Any]:
    """Replace "auto" bucket sizes by those for a hidden size; without one, leave them to DeepSpeed's defaults."""
    filled = {key: SIZES[key](width) if value == AUTO and width else value for key, value in zero.items()}
    return {key: value for key, value in filled.items() if value != AUTO}


def resolve_deepspeed(
    path: Path, config: RunConfig, stage: StageName, *, ranks: int = 1, has_cuda: bool = True
) -> DeepSpeedSettings:
    """Resolve a file for one stage of a run on so many ranks.

    Raises `UsageError`, one line, for what contradicts the run's configuration or what this trainer does not support.
    """
    content = read_preset(path)
    resolver = _Resolver(path, config, stage)
    settings = resolver.resolve(content)
    resolver.check_zero_plus_plus(settings["zero_optimization"], ranks, has_cuda)
    return DeepSpeedSettings(path, settings, tuple(resolver.warnings))


class _Resolver:
    """One file on its way to settings. Without a configuration (`anyres estimate`) only `zero` is of use."""

    def __init__(self, path: Path, config: RunConfig | None, stage: StageName | None) -> None:
        self.path, self.config, self.stage = path, config, stage
        self.warnings: list[str] = []

    def resolve(self, content: dict[str, Any]) -> dict[str, Any]:
        settings: dict[str, Any] = {"steps_per_print": QUIET, **ENGINE_VALUES}
        settings |= {key: value for key, (_, value) in self.run_values().items() if key != "train_batch_size"}
        blocks = {"bf16": AUTO, "zero_optimization": AUTO, **content}
        if "bfloat16" in blocks:
            blocks["bf16"] = blocks.pop("bfloat16") if blocks["bf16"] == AUTO else blocks["bf16"]
        for key, value in blocks.items():
            treatment = TREATMENTS.get(key)
            if treatment == "block":
                self.resolve_block(key, value, settings)
            elif key == "steps_per_print":
                settings[key] = self.steps_per_print(value)
            elif treatment == "passed":
                if (kept := _without_auto(value)) not in (AUTO, None):
                    settings[key] = kept
            elif treatment == "run":
                self.agree(key, value, *self.run_values()[key])
            elif treatment == "engine":
                self.warn_replaced(key, value)
            elif treatment == "unused":
                self.warn_unused(key, value)
            elif treatment == "refused":
                self.refuse(key, value)
            else:
                self.unknown(key)
        return settings

    def resolve_block(self, key: str, value: Any, settings: dict[str, Any]) -> None:
        if key == "bf16":
            settings[key] = self.bf16(value)
        elif key == "zero_optimization":
            settings[key] = self.zero(value)
        elif key == "optimizer":
            self.optimizer(self.section(key, value))
        elif key == "scheduler":
            self.scheduler(self.section(key, value))
        elif key == "data_types":
            settings[key] = {}
            for name, kind in self.section(key, value).items():
                if kind not in (AUTO, None, "fp32", "bf16"):
                    ours = f"precision={self.run.precision}"
                    raise self.contradiction(f"{key}.{name}", kind, ours, '"auto", "fp32" or "bf16"')
                settings[key][name] = "fp32" if kind == AUTO else kind
        elif value not in (AUTO, None):  # communication_data_type
            if str(value) in ("fp16", "float16"):
                raise self.contradiction(key, value, f"precision={self.run.precision}", "fp32 or bf16")
            settings[key] = value

    def steps_per_print(self, value: Any) -> Any:
        """Return the steps between DeepSpeed's log lines; 0 turns them off."""
        if value in (AUTO, None):
            return QUIET
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise UsageError(
                f"--deepspeed {self.path}: steps_per_print: expected a number of steps, got {shortened(value)}"
            )
        return value or QUIET

    @property
    def run(self) -> RunConfig:
        assert self.config is not None
        return self.config

    @property
    def settings(self) -> StageConfig:
        assert self.stage is not None
        return self.run.stage(self.stage)

    def run_values(self) -> dict[str, tuple[str, Any]]:
        """The run's name and value of each key that it decides."""
        return {
            "train_batch_size": (f"{self.stage}.batch_size", self.settings.batch_size),
            "gradient_clipping": (f"{self.stage}.max_grad_norm", self.settings.max_grad_norm),
            "gradient_allreduce_op": ("the exchange of gradients", "mean"),
        }

    def agree(self, key: str, value: Any, name: str, ours: Any) -> None:
        """Raise `UsageError` unless the value is "auto" or the run's."""
        if value not in (AUTO, None) and not _equal(value, ours):
            raise self.contradiction(key, value, f"{name}={ours}", f'"auto", or change {name} of the run')

    def warn_replaced(self, key: str, value: Any) -> None:
        ours = ENGINE_VALUES[key]
        if value in (AUTO, None, ours):
            return
        if key.startswith("zero_"):
            why = "the optimizer is torch's AdamW"
        else:
            why = f"a micro-batch is one pack of up to {self.settings.capacity:,} tokens, and {self.stage}.batch_size="
            why += f"{self.settings.batch_size} samples decides how many a step has"
        self.warnings.append(f"--deepspeed {self.path}: {key}={shortened(value)} is not used: {why}")

    def warn_unused(self, key: str, value: Any) -> None:
        if not _is_on(value):
            return
        recomputes = self.settings.activation_checkpointing
        why = {
            "activation_checkpointing": f"{self.stage}.activation_checkpointing={recomputes} decides",
            "flops_profiler": "metrics.jsonl records tokens/s and MFU",
        }.get(key, "the run has no use for it")
        self.warnings.append(f"--deepspeed {self.path}: {key} is not used: {why}")

    def refuse(self, key: str, value: Any) -> None:
        is_precision = key in ("fp16", "fp8", "amp", "torch_autocast")
        if is_precision and isinstance(value, dict):
            value = value.get("enabled", False)  # the others only tune it
        if not _is_on(value) or (key == "sequence_parallel_size" and value == 1):
            return
        if is_precision:
            raise self.contradiction(
                f"{key}.enabled", True, f"precision={self.run.precision}", "false, or set precision"
            )
        raise UsageError(f"--deepspeed {self.path}: {key} is not supported by this trainer: remove it")

    def unknown(self, key: str) -> None:
        if near := did_you_mean(key, list(TREATMENTS)):
            raise UsageError(f"--deepspeed {self.path}: unknown key {shortened(key)}{near}")
        self.warnings.append(f"--deepspeed {self.path}: unknown key {shortened(key)} is ignored, by DeepSpeed too")

    def bf16(self, block: Any) -> dict[str, Any]:
        enabled = self.run.precision == "bf16"
        given = self.section("bf16", block)
        if (wanted := given.get("enabled", AUTO)) not in (AUTO, None, enabled):
            raise self.contradiction(
                "bf16.enabled", wanted, f"precision={self.run.precision}", '"auto", or set precision'
            )
        for key in ("bf16_master_weights_and_grads", "bf16_optimizer_states"):
            if _is_on(given.get(key, False)):
                raise self.contradiction(f"bf16.{key}", True, "fp32 master weights and moments", "false")
        return {**_without_auto(given), "enabled": enabled}

    def optimizer(self, block: dict[str, Any]) -> None:
        """Check that the block is the run's AdamW; then it is dropped, because the run builds that itself."""
        stage = self.settings
        kind, params = block.get("type", AUTO), self.section("optimizer.params", block.get("params", {}))
        if str(kind).lower() not in ("adamw", "adam", AUTO):
            raise self.contradiction("optimizer.type", kind, "AdamW", "AdamW, or remove the block")
        ours = {**ADAMW, "lr": stage.learning_rate, "weight_decay": stage.weight_decay}
        names = {"lr": f"{self.stage}.learning_rate", "weight_decay": f"{self.stage}.weight_decay"}
        for key, value in params.items():
            if key in ours:
                self.agree(f"optimizer.params.{key}", value, names.get(key, key), ours[key])
            elif key not in SPEED_ONLY and value not in (AUTO, None):
                raise UsageError(
                    f"--deepspeed {self.path}: optimizer.params.{key}={shortened(value)} is not a setting of the run's "
                    "AdamW: remove it"
                )

    def scheduler(self, block: dict[str, Any]) -> None:
        """Check numbers against the run's warm-up and cosine; a type alone is replaced by these with a warning."""
        stage = self.settings
        kind, params = block.get("type", AUTO), self.section("scheduler.params", block.get("params", {}))
        ours: dict[str, Any] = {
            "warmup_max_lr": stage.learning_rate,
            "warmup_min_lr": 0,
            "warmup_min_ratio": 0,
            "cos_min_ratio": stage.eta_min / stage.learning_rate,
            "warmup_type": "linear",
        }
        schedule = (
            f"a warm-up of {self.stage}.warmup_ratio={stage.warmup_ratio:g} and a cosine down to {stage.eta_min:g}"
        )
        for key, value in params.items():
            if value not in (AUTO, None) and not (key in ours and _equal(value, ours[key])):
                raise self.contradiction(f"scheduler.params.{key}", value, schedule, '"auto", or remove the block')
        if kind not in (AUTO, "WarmupCosineLR"):
            if kind not in SCHEDULERS:
                raise self.contradiction("scheduler.type", kind, schedule, "no scheduler block")
            self.warnings.append(f"--deepspeed {self.path}: scheduler {kind} is not used: the run has {schedule}")

    def zero(self, block: Any) -> dict[str, Any]:
        zero: dict[str, Any] = _without_auto(self.section("zero_optimization", block), kept=SIZES)
        stage = self.section("zero_optimization", block).get("stage", 0)
        if type(stage) is not int or not 0 <= stage <= 3:
            raise UsageError(
                f"--deepspeed {self.path}: zero_optimization.stage: expected 0 to 3, got {shortened(stage)}"
            )
        for old, new in (("cpu_offload", "offload_optimizer"), ("cpu_offload_params", "offload_param")):
            if zero.pop(old, False) and new not in zero:  # older names
                zero[new] = {"device": "cpu"}
        for key in ("offload_optimizer", "offload_param"):
            part = self.section(f"zero_optimization.{key}", zero.get(key) or {})
            if part.get("device", "none") not in ("none", "cpu"):
                raise UsageError(
                    f"--deepspeed {self.path}: zero_optimization.{key}.device is {shortened(part['device'])}, this "
                    'trainer saves its checkpoints from memory: write "cpu" or "none"'
                )
        if _is_on(zero.get("zenflow", False)):
            raise UsageError(f"--deepspeed {self.path}: zero_optimization.zenflow is not supported: remove it")
        return {**zero, "stage": stage}

    def check_zero_plus_plus(self, zero: dict[str, Any], ranks: int, has_cuda: bool) -> None:
        """Raise `UsageError` for keys of ZeRO++ that these ranks or devices cannot run."""
        group = zero.get("zero_hpz_partition_size", 1)
        if zero["stage"] == 3 and type(group) is int and group > 1 and ranks % group:
            raise UsageError(
                f"--deepspeed {self.path}: zero_optimization.zero_hpz_partition_size={group} does not divide {ranks} "
                "ranks: set it to the GPUs of a node, or remove it"
            )
        for key in ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights"):
            if _is_on(zero.get(key, False)) and not has_cuda:
                raise UsageError(
                    f"--deepspeed {self.path}: zero_optimization.{key} needs CUDA devices, and this machine has none: "
                    "remove it"
                )

    def section(self, key: str, value: Any) -> dict[str, Any]:
        if value in (AUTO, None):
            return {}
        if not isinstance(value, dict):
            raise UsageError(f"--deepspeed {self.path}: {key}: expected an object, got {type(value).__name__}")
        return value

    def contradiction(self, key: str, value: Any, ours: str, remedy: str) -> UsageError:
        return UsageError(f"--deepspeed {self.path}: {key} is {shortened(value)}, the run has {ours}: write {remedy}")


def _without_auto(value: Any, kept: Any = ()) -> Any:
    """Drop "auto" at every depth, so that DeepSpeed's defaults hold, but for the `kept` keys."""
    if not isinstance(value, dict):
        return value
    return {key: _without_auto(part) for key, part in value.items() if part != AUTO or key in kept}


def _equal(value: Any, ours: Any) -> bool:
    """Whether a JSON value is the run's; numbers may be rounded, and truth values are not numbers."""
    if isinstance(ours, list):
        return isinstance(value, list) and len(value) == len(ours) and all(map(_equal, value, ours))
    if isinstance(value, bool) or isinstance(ours, bool) or not isinstance(value, int | float):
        return type(value) is type(ours) and bool(value == ours)
    return math.isclose(value, ours, rel_tol=1e-9)


def _is_on(value: Any) -> bool:
    """Whether a key or section is switched on; a section without `enabled` is, if anything in it is."""
    if isinstance(value, dict):
        if "enabled" in value:
            return _is_on(value["enabled"])
        return any(_is_on(part) for part in value.values())
    return value not in (AUTO, None, "none", "") and bool(value)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        repeated: Iterator[str] = (key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
        raise ValueError(f"key {shortened(next(repeated))} appears twice")
    return content
