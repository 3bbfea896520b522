"""Optional kernels for RMSNorm, rotary embeddings and SwiGLU of the language model: Liger's, or torch.compile's.

Both fuse elementwise operations that otherwise each read and write the whole sequence. They round differently from the
default, `none`, so their losses differ in the last digits. The embedding, attention and the loss are not affected.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from anyres_vlm.errors import UsageError

Kernels = Literal["none", "liger", "compile"]
COMPILED = ("RMSNorm", "MLP")  # endings of the class names of modules that are compiled
ROTARY = "apply_rotary_pos_emb"  # the function that models of transformers define beside their classes


def require_kernels(kernels: Kernels, *, zero_stage: int = 0) -> None:
    """Raise `UsageError` where the kernels are not installed or cannot run."""
    if kernels == "liger" and find_spec("liger_kernel") is None:
        raise UsageError("kernels=liger needs Liger: pip install 'anyres-vlm[liger]', or set kernels: none")
    if kernels == "liger" and not torch.cuda.is_available():
        raise UsageError("kernels=liger needs a CUDA device: set kernels: none")
    if kernels == "compile" and zero_stage == 3:
        raise UsageError(
            "kernels=compile does not work with ZeRO-3, which replaces the weights of a layer around each call: use "
            "zero2, kernels: liger or kernels: none"
        )


def apply_kernels(model: PreTrainedModel, kernels: Kernels) -> None:
    """Replace operations of a language model, in place. Names of parameters do not change.

    Rotary embeddings are replaced for all models of this architecture in the process. Raises `UsageError` for an
    architecture that Liger does not know.
    """
    if kernels == "liger":
        _apply_liger(model)
    elif kernels == "compile":
        for module in model.modules():
            if type(module).__name__.endswith(COMPILED):
                module.compile(dynamic=True)
        modeling: Any = sys.modules[type(model).__module__]
        if (rotary := getattr(modeling, ROTARY, None)) is not None and not hasattr(rotary, "get_compiler_config"):
            setattr(modeling, ROTARY, torch.compile(rotary, dynamic=True))


def _apply_liger(model: PreTrainedModel) -> None:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN  # optional: the extra `liger`

    kind: str = model.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UsageError(f"kernels=liger: Liger has no kernels for models of type {kind}: set kernels: none")
    # The loss has its own fused head.
    MODEL_TYPE_TO_APPLY_LIGER_FN[kind](model=model, cross_entropy=False, fused_linear_cross_entropy=False)
