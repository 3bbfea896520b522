"""DeepSpeed files as people have them: taken where they agree with the run, one line where they do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.zero.config import get_zero_config
from deepspeed_files import PUBLISHED, WARMUP

from anyres_vlm.config import RunConfig, load_config, shipped_config
from anyres_vlm.errors import UsageError
from anyres_vlm.preflight.estimate.memory import PRESETS, read_sharding
from anyres_vlm.train.engine.deepspeed_settings import (
    QUIET,
    DeepSpeedSettings,
    find_preset,
    read_preset,
    read_zero,
    resolve_deepspeed,
)
from anyres_vlm.train.engine.zero import check_zero


def run_config(*overrides: str) -> RunConfig:
    return load_config(shipped_config("tiny"), overrides)


def resolve(folder: Path, content: object, *overrides: str, ranks: int = 1) -> DeepSpeedSettings:
    path = folder / "ds.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return resolve_deepspeed(path, run_config(*overrides), "stage2", ranks=ranks, has_cuda=False)


def holds_auto(content: Any) -> bool:
    return content == "auto" or (isinstance(content, dict) and any(map(holds_auto, content.values())))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_taken(tmp_path: Path, name: str, precision: str) -> None:
    settings = resolve(tmp_path, PUBLISHED[name], f"precision={precision}", "stage2.max_grad_norm=0.7")
    check_zero(settings)
    filled = settings.sized(100)
    assert not holds_auto(filled)
    assert filled["bf16"]["enabled"] == (precision == "bf16")
    assert filled["gradient_clipping"] == 0.7
    assert {"optimizer", "scheduler", "fp16", "train_batch_size"}.isdisjoint(filled)
    given = PUBLISHED[name]["zero_optimization"]
    kept = {key: value for key, value in given.items() if value != "auto"}
    assert kept.items() <= filled["zero_optimization"].items(), "all else of ZeRO is DeepSpeed's to have"
    if given.get("stage3_prefetch_bucket_size") == "auto":
        sizes = {"reduce_bucket_size": 10_000, "stage3_prefetch_bucket_size": 9_000}
        assert (sizes | {"stage3_param_persistence_threshold": 1000}).items() <= filled["zero_optimization"].items()
    schedules = [warning for warning in settings.warnings if "scheduler" in warning]
    assert len(schedules) == len(settings.warnings) == ("scheduler" in PUBLISHED[name])


ZERO = {"zero_optimization": {"stage": 2}}
CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"train_batch_size": 64}, r"train_batch_size is 64, the run has stage2.batch_size=16: write \"auto\""),
    ({"gradient_clipping": 2.0}, r"gradient_clipping is 2.0, the run has stage2.max_grad_norm=1.0"),
    ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op is 'sum'"),
    ({"bf16": {"enabled": True}}, "bf16.enabled is True, the run has precision=fp32"),
    ({"bfloat16": {"enabled": True}}, "bf16.enabled is True, the run has precision=fp32"),
    ({"bf16": True}, "bf16: expected an object, got bool"),
    ({"fp16": {"enabled": True}}, "fp16.enabled is True, the run has precision=fp32"),
    ({"amp": {"enabled": True, "opt_level": "O1"}}, "amp.enabled is True"),
    ({"fp8": {"enabled": True}}, "fp8.enabled is True"),
    ({"communication_data_type": "fp16"}, "communication_data_type is 'fp16', the run has precision=fp32"),
    ({"communication_data_type": "fp8"}, "Invalid communication_data_type"),
    ({"data_types": {"grad_accum_dtype": "fp16"}}, "grad_accum_dtype is 'fp16', the run has precision=fp32"),
    ({"checkpoint": {"tag_validation": "Perhaps"}}, "tag_validation"),
    ({"steps_per_print": "ten"}, "steps_per_print: expected a number of steps, got 'ten'"),
    ({"steps_per_print": -1}, "steps_per_print: expected a number of steps, got -1"),
    ({"optimizer": {"type": "Lion"}}, "optimizer.type is 'Lion', the run has AdamW"),
    ({"optimizer": {"type": "AdamW", "params": {"lr": 3e-5}}}, r"params.lr is 3e-05, the run has stage2.learning_rate"),
    (
        {"optimizer": {"params": {"betas": [0.9, 0.95]}}},
        r"params.betas is \[0.9, 0.95\], the run has betas=\[0.9, 0.999",
    ),
    ({"optimizer": {"params": {"weight_decay": 0.1}}}, "weight_decay is 0.1, the run has stage2.weight_decay=0.0"),
    ({"optimizer": {"params": {"adam_w_mode": False}}}, "adam_w_mode is False"),
    ({"optimizer": {"params": {"momentum": 0.9}}}, "optimizer.params.momentum=0.9 is not a setting of the run's AdamW"),
    (
        {"scheduler": {"type": "OneCycle"}},
        "scheduler.type is 'OneCycle', the run has a warm-up of stage2.warmup_ratio=0.03",
    ),
    ({"scheduler": {"params": {"warmup_num_steps": 100}}}, "warmup_num_steps is 100, .*stage2.warmup_ratio"),
    ({"scheduler": {"params": {"warmup_max_lr": 1e-3}}}, "warmup_max_lr is 0.001"),
    ({"curriculum_learning": {"enabled": True}}, "curriculum_learning is not supported"),
    ({"sequence_parallel_size": 4}, "sequence_parallel_size is not supported"),
    ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel is not supported"),
    ({"gradient_cliping": 1.0}, "unknown key 'gradient_cliping'; did you mean gradient_clipping"),
    ({"zero_optimization": {"stage": "auto"}}, "zero_optimization.stage: expected 0 to 3, got 'auto'"),
    ({"zero_optimization": {"stage": 4}}, "expected 0 to 3, got 4"),
    ({"zero_optimization": {"stage": True}}, "expected 0 to 3, got True"),
    ({"zero_optimization": [2]}, "zero_optimization: expected an object, got list"),
    (
        {"zero_optimization": {"stage": 2, "reduce_buket_size": 5}},
        "unknown key 'reduce_buket_size'; did you mean reduce_b",
    ),
    ({"zero_optimization": {"stage": 2, "overlap_comm": "perhaps"}}, "overlap_comm"),
    (
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/x"}}},
        "is 'nvme', this trainer",
    ),
    ({"zero_optimization": {"stage": 3, "offload_optimizer": {"devise": "cpu"}}}, "devise"),
    ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, "=8 does not divide 2 ranks"),
    ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "zero_quantized_weights needs CUDA devices"),
]


@pytest.mark.parametrize("value", [0, None, "auto"])
def test_steps_per_print_of_nothing_is_quiet(tmp_path: Path, value: Any) -> None:
    assert resolve(tmp_path, {**ZERO, "steps_per_print": value}).content["steps_per_print"] == QUIET
    assert resolve(tmp_path, {**ZERO, "steps_per_print": 1e5}).content["steps_per_print"] == 1e5


def test_a_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(ZERO), encoding="utf-8-sig")
    assert read_preset(tmp_path / "ds.json") == ZERO


@pytest.mark.parametrize(("content", "words"), CONTRADICTIONS, ids=lambda value: json.dumps(value)[:60])
def test_a_contradiction_is_one_line(tmp_path: Path, content: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        check_zero(resolve(tmp_path, {**ZERO, **content}, ranks=2))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"--deepspeed {tmp_path / 'ds.json'}: ")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"train_micro_batch_size_per_gpu": 4}, "=4 is not used: a micro-batch is one pack of up to"),
        ({"gradient_accumulation_steps": 8}, "stage2.batch_size=16 samples decides"),
        ({"zero_force_ds_cpu_optimizer": True}, "the optimizer is torch's AdamW"),
        (
            {"activation_checkpointing": {"partition_activations": True}},
            "stage2.activation_checkpointing=False decides",
        ),
        ({"flops_profiler": {"enabled": True}}, "flops_profiler is not used"),
        ({"scheduler": WARMUP}, "scheduler WarmupLR is not used: the run has a warm-up"),
        ({"notes": "mine"}, "unknown key 'notes' is ignored"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_harmless_is_a_warning(tmp_path: Path, content: dict[str, Any], words: str) -> None:
    (warning,) = resolve(tmp_path, {**ZERO, **content}).warnings
    assert words in warning


@pytest.mark.parametrize(
    "content",
    [
        {"train_batch_size": 32, "gradient_clipping": 1, "train_micro_batch_size_per_gpu": 1},
        {"optimizer": {"type": "Adam", "params": {"lr": 0.0005, "betas": [0.9, 0.999], "eps": 1e-08, "fused": True}}},
        {"scheduler": {"type": "WarmupCosineLR", "params": {"warmup_min_ratio": 0.0, "warmup_type": "linear"}}},
        {
            "fp16": {"loss_scale": 128, "enabled": False},
            "amp": {"enabled": False},
            "flops_profiler": {"enabled": False},
        },
        {"fp16": "auto", "bf16": "auto", "communication_data_type": "auto", "optimizer": "auto", "scheduler": None},
        {"activation_checkpointing": {"partition_activations": False, "number_checkpoints": None}},
        {"sequence_parallel_size": 1, "elasticity": {"enabled": False}, "compression_training": {}},
    ],
    ids=str,
)
def test_what_agrees_is_silent(tmp_path: Path, content: dict[str, Any]) -> None:
    settings = resolve(tmp_path, {**ZERO, **content}, "stage2.learning_rate=5e-4", "stage2.batch_size=32")
    assert settings.warnings == ()
    assert not holds_auto(settings.sized(64))


def test_files_are_found_and_read(tmp_path: Path) -> None:
    assert find_preset("zero2_offload").is_file()
    with pytest.raises(UsageError, match="expected a JSON file or one of zero1, zero2"):
        find_preset("zero4")
    path = tmp_path / "ds.json"
    path.write_text('{"bf16": {}, "bf16": {}}', encoding="utf-8")
    with pytest.raises(UsageError, match="key 'bf16' appears twice"):
        resolve_deepspeed(path, run_config(), "stage1")
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(UsageError, match="expected a JSON object, got list"):
        resolve_deepspeed(path, run_config(), "stage1")
    path.write_text(json.dumps(PUBLISHED["llava-zero3"]), encoding="utf-8")
    assert read_zero(path, 4096)["reduce_bucket_size"] == 4096**2
    assert "reduce_bucket_size" not in read_zero(path)


@pytest.mark.parametrize(
    ("name", "stage", "optimizer", "weights"),
    [
        ("zero1", 1, False, False),
        ("zero2", 2, False, False),
        ("zero2_offload", 2, True, False),
        ("zero3", 3, False, False),
        ("zero3_offload", 3, True, True),
    ],
)
def test_deepspeed_reads_the_shipped_presets_as_named(name: str, stage: int, optimizer: bool, weights: bool) -> None:
    settings = resolve_deepspeed(find_preset(name), run_config("precision=bf16"), "stage1", has_cuda=False)
    check_zero(settings)
    assert settings.warnings == ()
    theirs = get_zero_config(settings.content)
    assert theirs.stage == stage
    for offload, wanted in ((theirs.offload_optimizer, optimizer), (theirs.offload_param, weights)):
        assert (offload is not None and offload.device == "cpu") == wanted
    assert settings.content["bf16"] == {"enabled": True}


@pytest.mark.parametrize("name", [*PRESETS[1:], {"stage": 2, "overlap_comm": False}, {"stage": 3}])
def test_the_estimate_reads_sizes_as_deepspeed_does(tmp_path: Path, name: str | dict[str, Any]) -> None:
    """Of the shipped presets, and DeepSpeed's defaults for what a file leaves out."""
    path = find_preset(name) if isinstance(name, str) else tmp_path / "own.json"
    if not isinstance(name, str):
        path.write_text(json.dumps({"zero_optimization": name}))
    theirs, ours = get_zero_config(json.loads(path.read_text())), read_sharding(str(path))
    assert (ours.stage, ours.bucket, ours.subgroup) == (
        theirs.stage, theirs.reduce_bucket_size, theirs.sub_group_size,
    )  # fmt: skip
    assert (ours.prefetch, ours.persistent, ours.live) == (
        theirs.prefetch_bucket_size, theirs.param_persistence_threshold, theirs.max_live_parameters,
    )  # fmt: skip
    assert ours.offloads_optimizer == (theirs.offload_optimizer is not None)
    assert ours.offloads_weights == (theirs.offload_param is not None)
    if ours.stage < 3:
        assert ours.buckets == 1 + theirs.overlap_comm, "DeepSpeed reduces one bucket while it fills the next"
