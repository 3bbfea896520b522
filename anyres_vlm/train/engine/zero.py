"""The ZeRO backend: optimizer state, gradients and weights split over the ranks by DeepSpeed."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from pydantic import ValidationError
from torch import Tensor, nn
from torch.optim import AdamW

from anyres_vlm.errors import UsageError, did_you_mean, explain, shortened
from anyres_vlm.model.vlm import VisionLanguageModel
from anyres_vlm.schema import Batch
from anyres_vlm.train.engine.deepspeed_settings import DeepSpeedSettings, fill_sizes
from anyres_vlm.train.engine.plain import MOMENTS, ReadTensor, Snapshot, blank_entry, trained_parameters

# What this module uses of DeepSpeed's objects, most of it undocumented, so each minor version may change it. The extra
# `deepspeed` in pyproject.toml allows the minor version for which this list and the code below were written.
INTERNALS = {
    "engine": (
        "backward",
        "get_global_grad_norm",
        "set_gradient_accumulation_boundary",
        "step",
        "zero_optimization_stage",
    ),
    "optimizer of every ZeRO stage": ("optimizer", "overflow"),
    "optimizer of ZeRO-1 and ZeRO-2": ("_hp_optimizer_states_linked", "_lazy_init_hp_params_optimizer_state"),
    "optimizer of ZeRO-3": ("fp32_partitioned_groups_flat", "set_local_hp_param"),
    "parameter of ZeRO-1 and ZeRO-2": ("set_full_hp_param",),
    "parameter of ZeRO-3": ("ds_tensor",),
    "part of a parameter of ZeRO-3": ("ds_numel",),
    "deepspeed.ops": ("__compatible_ops__",),
}


def require_internals(engine: Any, zero: Any, parameter: Any) -> None:
    """Raise `UsageError` if DeepSpeed's objects lack what this module uses; otherwise a save hours later would fail."""
    _require("engine", engine)
    _require("optimizer of every ZeRO stage", zero)
    _require("deepspeed.ops", deepspeed.ops)
    if engine.zero_optimization_stage() == 3:
        _require("optimizer of ZeRO-3", zero)
        _require("parameter of ZeRO-3", parameter)
        _require("part of a parameter of ZeRO-3", parameter.ds_tensor)
    else:
        _require("optimizer of ZeRO-1 and ZeRO-2", zero)
        _require("parameter of ZeRO-1 and ZeRO-2", parameter)


def _require(what: str, subject: Any) -> None:
    for name in INTERNALS[what]:
        if not hasattr(subject, name):
            raise UsageError(
                f"DeepSpeed {deepspeed.__version__} has no {name} in the {what}, which training needs: "
                "pip install 'anyres-vlm[deepspeed]'"
            )


def check_zero(settings: DeepSpeedSettings) -> None:
    """Raise `UsageError` unless DeepSpeed itself accepts the settings."""
    fields = DeepSpeedZeroConfig.model_fields
    known = [*fields, *(field.alias for field in fields.values() if field.alias is not None)]
    where = f"--deepspeed {settings.path}: zero_optimization"
    zero = fill_sizes(settings.content["zero_optimization"], None)
    for key in zero:
        if key not in known:
            raise UsageError(f"{where}: unknown key {shortened(key)}{did_you_mean(key, known)}")
    try:
        DeepSpeedZeroConfig(**zero)
    except (ValidationError, AssertionError) as error:
        reason = explain(error, DeepSpeedZeroConfig) if isinstance(error, ValidationError) else str(error)
        raise UsageError(f"{where}: {reason}") from None
    try:
        DeepSpeedConfig({**settings.content, "zero_optimization": zero})
    except Exception as error:  # DeepSpeed raises errors of any kind for values of other sections
        raise UsageError(f"--deepspeed {settings.path}: {' '.join(str(error).split())}") from None


def split(model: nn.Module, settings: dict[str, Any]) -> None:
    """Cast the parameters and move them to their ranks one by one.

    By itself DeepSpeed first moves the whole model to every device, where 34B parameters do not fit.
    """
    for parameter in model.parameters():
        if settings["bf16"]["enabled"]:
            parameter.data = parameter.data.to(torch.bfloat16)
    deepspeed.zero.Init(module=model, config_dict_or_path=settings)


class ZeroBackend:
    """Forward, backward and update through a DeepSpeed engine. Every method is called on all ranks together."""

    def __init__(
        self,
        model: VisionLanguageModel,
        optimizer: AdamW,
        settings: dict[str, Any],
        device: torch.device,
        *,
        is_main: bool,
    ) -> None:
        self._module, self._is_main = model, is_main
        # On a CPU, DeepSpeed would compile this for a minute, with a compiler that may be missing, for inference only.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # DeepSpeed casts floating buffers with the weights: rotary frequencies in bf16 lose precision at long range.
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        if settings.get("zero_optimization", {}).get("stage") == 3:
            split(model, settings)
        self._engine, self._zero, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, dist_init_required=False
        )
        _, first = next(trained_parameters(model))
        require_internals(self._engine, self._zero, first)
        for name, buffer in model.named_buffers():
            buffer.data = buffers[name].to(device)
        self._is_stage_3 = self._engine.zero_optimization_stage() == 3

    def micro_step(self, batch: Batch, scale: float, *, is_last: bool) -> Tensor:
        """Add a pack's scaled gradient; ranks exchange it as the ZeRO stage does. Returns its summed loss, ()."""
        self._engine.set_gradient_accumulation_boundary(is_last)
        loss: Tensor = self._engine(batch)
        self._engine.backward(loss * scale)
        return loss.detach()

    def update(self) -> float:
        """Clip by the global norm and update, unless it is not finite. Returns the norm before clipping."""
        self._engine.step()
        return float("inf") if self._zero.overflow else float(self._engine.get_global_grad_norm())

    def snapshot(self) -> Snapshot:
        """Gather the trained weights, from their fp32 masters, and the optimizer's state on rank 0."""
        weights: dict[str, Tensor] = {}
        moments: dict[str, Tensor] = {}
        counts = [int(entry["step"]) for entry in self._zero.optimizer.state.values() if "step" in entry]
        if counts and not self._is_stage_3:
            # DeepSpeed links parameters to their moments when the first group has been updated: others had none then.
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()
        for name, parameter in trained_parameters(self._module):
            weights[name] = self._whole(parameter)
            for moment in MOMENTS if counts else ():
                moments[f"{name}.{moment}"] = self._keep(safe_get_full_optimizer_state(parameter, moment))
        return Snapshot(weights, moments, counts[0] if counts else 0) if self._is_main else Snapshot({}, {}, 0)

    def weights(self) -> dict[str, Tensor]:
        """Gather the whole model's state dict on rank 0, trained weights from their fp32 masters."""
        gathered = {
            id(parameter): self._whole(parameter)
            for parameter in self._module.parameters()
            if parameter.requires_grad or self._is_stage_3
        }
        if not self._is_main:
            return {}
        known = {name: id(part) for name, part in self._module.named_parameters(remove_duplicate=False)}
        state: dict[str, Tensor] = self._module.state_dict()
        return {name: gathered.get(known.get(name, 0), tensor).cpu() for name, tensor in state.items()}

    def restore(self, updates: int, read: ReadTensor) -> None:
        """Load a saved optimizer state, and the fp32 masters of this rank's weights."""
        for name, parameter in trained_parameters(self._module):
            self._set(parameter, read(name), None)
        if not updates:
            return
        adamw = self._zero.optimizer
        if self._is_stage_3:
            flats = self._zero.fp32_partitioned_groups_flat
        else:
            flats = [flat for group in adamw.param_groups for flat in group["params"]]
        for flat in flats:
            adamw.state[flat] = blank_entry(flat, updates)
        if not self._is_stage_3:
            self._zero._lazy_init_hp_params_optimizer_state()  # as its own step() and load_checkpoint() do
        for name, parameter in trained_parameters(self._module):
            for moment in MOMENTS:
                self._set(parameter, read(f"{name}.{moment}"), moment)

    def _set(self, parameter: Any, value: Tensor, moment: str | None) -> None:
        """Set this rank's part of a master (`moment` None) or of a moment; DeepSpeed adds the methods to parameters."""
        value = value.float().flatten()
        if not self._is_stage_3:
            parameter.set_full_hp_param(value.to(parameter.device), moment)
            return
        # DeepSpeed's setter of whole tensors reads out of bounds if numel is not divisible by the number of ranks.
        size = parameter.ds_tensor.ds_numel
        part = nn.functional.pad(value, (0, size * dist.get_world_size() - value.numel()))[size * dist.get_rank() :]
        self._zero.set_local_hp_param(part[:size], parameter, moment)

    def _whole(self, parameter: nn.Parameter) -> Tensor:
        if parameter.requires_grad:
            return self._keep(safe_get_full_fp32_param(parameter))
        with deepspeed.zero.GatheredParameters([parameter], enabled=self._is_stage_3):
            return self._keep(parameter.detach().clone())

    def _keep(self, tensor: Tensor | None) -> Tensor:
        """Copy to the CPU on rank 0; an empty tensor elsewhere, which saves memory."""
        assert tensor is not None, "a trained parameter has a master and moments"
        return tensor.cpu() if self._is_main else tensor.new_empty(0, device="cpu")
