"""DeepSpeed settings as people have them, by the project that publishes them."""

from __future__ import annotations

from typing import Any

AUTOS = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
FP16 = {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2}
PRECISION = {"fp16": {**FP16, "min_loss_scale": 1}, "bf16": {"enabled": "auto"}}
ADAMW = {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")}
WARMUP = {"type": "WarmupLR", "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto")}
COMM = {"overlap_comm": True, "contiguous_gradients": True}
STAGE_3 = {
    "stage": 3,
    **COMM,
    "sub_group_size": 1e9,
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": True,
}
STAGE_2 = {
    "stage": 2,
    **COMM,
    "allgather_partitions": True,
    "allgather_bucket_size": 2e8,
    "reduce_scatter": True,
    "reduce_bucket_size": 2e8,
}
CPU = {"device": "cpu", "pin_memory": True}
NONE = {"device": "none", "pin_memory": True}
FACTORY = {
    **AUTOS,
    **PRECISION,
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "comms_config": {"verbose": False},
    "monitor_config": {"enabled": True, "tag": "DeepSpeedMonitor", "csv_monitor": {"enabled": False}},
}
PLAIN = {**AUTOS, **PRECISION, "gradient_clipping": "auto", "steps_per_print": 100, "wall_clock_breakdown": False}
PUBLISHED: dict[str, dict[str, Any]] = {
    "llava-zero2": {**PRECISION, **AUTOS, "zero_optimization": {"stage": 2, **COMM, "reduce_bucket_size": "auto"}},
    "llava-zero3": {**PRECISION, **AUTOS, "zero_optimization": STAGE_3},
    "llava-zero3_offload": {
        **PLAIN,
        "optimizer": ADAMW,
        "scheduler": WARMUP,
        "steps_per_print": 1e5,
        "zero_optimization": {
            **{key: value for key, value in STAGE_3.items() if "gather" not in key},
            "gather_16bit_weights_on_model_save": True,
            "offload_optimizer": CPU,
            "offload_param": CPU,
        },
    },
    "llava-next-zero0": {**PLAIN, "zero_optimization": {"stage": 0}},
    "llava-next-zero2_fused_adamw": {
        **PLAIN,
        "optimizer": ADAMW,
        "zero_optimization": {**STAGE_2, "offload_optimizer": NONE},
    },
    "llava-next-zero3": {
        **PLAIN,
        "optimizer": ADAMW,
        "zero_optimization": {**STAGE_3, "offload_optimizer": NONE, "offload_param": NONE},
    },
    "open-llava-next-zero2": {**PRECISION, **AUTOS, "zero_optimization": {**STAGE_2, "sub_group_size": 1e9}},
    "open-llava-next-zero3": {**PRECISION, **AUTOS, "zero_optimization": STAGE_3},
    "llama-factory-z0": {
        **FACTORY,
        "zero_optimization": {**STAGE_2, "stage": 0, "overlap_comm": False, "round_robin_gradients": True},
    },
    "llama-factory-z2": {
        **FACTORY,
        "zero_optimization": {**STAGE_2, "overlap_comm": False, "round_robin_gradients": True},
    },
    "llama-factory-z2_offload": {
        **FACTORY,
        "zero_optimization": {**STAGE_2, "offload_optimizer": CPU, "round_robin_gradients": True},
    },
    "llama-factory-z3": {**FACTORY, "zero_optimization": {**STAGE_3, "overlap_comm": False}},
    "llama-factory-z3_offload": {
        **FACTORY,
        "zero_optimization": {**STAGE_3, "offload_optimizer": CPU, "offload_param": CPU},
    },
    "transformers-zero3": {
        **PLAIN,
        "optimizer": ADAMW,
        "scheduler": {"type": "WarmupDecayLR", "params": {**WARMUP["params"], "total_num_steps": "auto"}},
        "zero_optimization": {**STAGE_3, "offload_optimizer": CPU, "offload_param": CPU},
        "steps_per_print": 2000,
    },
}
