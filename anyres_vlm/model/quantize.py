"""Linear layers of the language model held in 4 or 8 bits by bitsandbytes: for QLoRA, and for inference.

Word embeddings, norms, the head and adapters are not quantised. bitsandbytes is the optional extra `quantize`, imported
when a layer is quantised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from anyres_vlm.errors import UsageError
from anyres_vlm.model.attention import compute_dtype

Load = Literal["4bit", "8bit"]


def require_bitsandbytes(what: str) -> None:
    """Raise `UsageError` if bitsandbytes is not installed; `what` is the setting that needs it."""
    if find_spec("bitsandbytes") is None:
        raise UsageError(f"{what} needs bitsandbytes: pip install 'anyres-vlm[quantize]'")


class Nf4Linear(nn.Module):
    """A frozen linear layer in NF4 with doubly quantised scales (QLoRA, arXiv:2305.14314): 4.13 bits per weight.

    It computes in autocast's dtype, or else in its input's. In a state dict it is a plain layer: the weight is unpacked
    to the dtype that it was packed from, on the CPU.
    """

    def __init__(self, layer: nn.Linear, device: torch.device) -> None:
        from bitsandbytes.functional import quantize_4bit

        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        packed, self.scales = quantize_4bit(
            layer.weight.detach().to(device), quant_type="nf4", compress_statistics=True
        )
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().to(device), requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        from bitsandbytes import matmul_4bit

        dtype = compute_dtype(inputs)
        bias = None if self.bias is None else self.bias.to(dtype)
        out: Tensor = matmul_4bit(inputs.to(dtype), self.weight.t(), quant_state=self.scales, bias=bias)
        return out

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Nf4Linear:
        """Move the scales with the weight."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scales.to(self.weight.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        from bitsandbytes.functional import dequantize_4bit

        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = dequantize_4bit(self.weight.data, self.scales).cpu()


def decoder_matrices(language_model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the linear layers to quantise, by name: frozen ones, without the head and without adapters."""
    head = language_model.get_output_embeddings()
    for name, module in language_model.named_modules():
        if type(module) is nn.Linear and module is not head and not module.weight.requires_grad:
            yield name, module


def quantize(language_model: PreTrainedModel, load: Load, device_of: Callable[[str], torch.device]) -> None:
    """Replace the frozen linear layers of the decoder by quantised ones, one by one, each on the device of its name."""
    for name, layer in list(decoder_matrices(language_model)):
        parent, _, own = name.rpartition(".")
        device = device_of(name)
        packed = Nf4Linear(layer, device) if load == "4bit" else _in_8_bits(layer, device)
        setattr(language_model.get_submodule(parent), own, packed)


def _in_8_bits(layer: nn.Linear, device: torch.device) -> nn.Module:
    """Return the layer in 8 bits (LLM.int8(), arXiv:2208.07339), for inference only."""
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    packed: nn.Module = Linear8bitLt(
        layer.in_features,
        layer.out_features,
        layer.bias is not None,
        has_fp16_weights=False,
        threshold=6.0,
        device="meta",
    )
    packed.weight = Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    packed.bias = layer.bias
    return packed.to(device)
