"""Summed next-token cross-entropy; the language-model head runs only at supervised positions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from anyres_vlm.errors import UsageError
from anyres_vlm.model.attention import compute_dtype

CPU_CHUNK = 512  # 512 x 32064 logits take 66 MB in fp32 and stay close to the caches
GPU_CHUNK, GPU_LOGITS = 2048, 1 << 27  # 2048 x 64000 logits take 524 MB in fp32


def chunk_positions(vocab_size: int, device_type: str) -> int:
    """Return the number of supervised positions whose logits are held at once.

    512 on a CPU. On a GPU, min(2048, 2^27 / V) rounded down to a multiple of 128, but at least 128: 2048 for V up to
    64K, 1024 for Llama 3's 128K, 768 for Qwen's 152K. Each chunk adds its part to the gradient of the head in fp32, so
    c positions do about c / 2 operations per byte moved; GPUs need 200 to 300, while logits take 6 c V bytes.
    """
    if device_type == "cpu":
        return CPU_CHUNK
    return max(min(GPU_CHUNK, GPU_LOGITS // vocab_size) // 128 * 128, 128)


def summed_loss(
    hidden: Tensor, positions: Tensor, targets: Tensor, head: nn.Module, chunk: int | None = None
) -> Tensor:
    """Sum the cross-entropy in nats over the supervised positions (K,), in fp32. (1, L, D) -> ().

    `targets` (K,) are the tokens that these positions predict, as `supervision` returns them. The caller divides by the
    number of supervised tokens of the whole optimizer step. Logits and their gradient are computed together, once, for
    `chunk_positions` positions at a time, or `chunk`, so the memory for logits does not grow with the sequence or the
    number of labels. Raises `UsageError` unless the head is a plain `nn.Linear`.
    """
    if type(head) is not nn.Linear:
        raise UsageError(
            f"the loss needs a plain linear language-model head, got {type(head).__name__}: leave it unwrapped"
        )
    # Weight and bias are arguments so that autograd delivers their gradients once and DDP's hooks fire.
    states = hidden[0].index_select(0, positions)
    chunk = chunk or chunk_positions(head.out_features, hidden.device.type)
    total: Tensor = _HeadLoss.apply(states, targets, head.weight, head.bias, chunk, torch.is_grad_enabled())
    return total


class _HeadLoss(torch.autograd.Function):
    """Fused linear head and cross-entropy: (K, D), (K,), (V, D), (V,) -> (). Differentiable once.

    The forward pass also computes the gradients while it has the logits. Recomputing the logits in the backward pass
    would add a fourth matrix product to three. The idea is that of fused linear cross-entropy kernels (Liger,
    arXiv:2410.10989).
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, size: int, with_gradients: bool
    ) -> Tensor:
        dtype = compute_dtype(states)
        grad_states, grad_weight, grad_bias = (
            torch.zeros_like(tensor, dtype=torch.float32) if with_gradients and needed and tensor is not None else None
            for tensor, needed in zip((states, weight, bias), (ctx.needs_input_grad[i] for i in (0, 2, 3)), strict=True)
        )
        total = torch.zeros((), dtype=torch.float32, device=states.device)
        with torch.autocast(states.device.type, enabled=False):
            low_weight, low_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
            for first in range(0, len(states), size):
                chunk = states[first : first + size].to(dtype)
                logits = F.linear(chunk, low_weight, low_bias).float()
                total += _loss_and_gradient(logits, targets[first : first + size, None])
                if grad_bias is not None:
                    grad_bias += logits.sum(0)
                logits = logits.to(dtype)
                if grad_states is not None:
                    grad_states[first : first + size] = logits @ low_weight
                if grad_weight is not None and dtype == torch.float32:
                    grad_weight.addmm_(logits.T, chunk)
                elif grad_weight is not None:
                    grad_weight += logits.T @ chunk
        ctx.gradients = [
            None if gradient is None or tensor is None else gradient.to(tensor.dtype)
            for gradient, tensor in zip((grad_states, grad_weight, grad_bias), (states, weight, bias), strict=True)
        ]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        # No reference is kept, so the weight's gradient is scaled in place and becomes the parameter's without a copy.
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "backward of the loss runs once"
        grad_states, grad_weight, grad_bias = (
            None if gradient is None else gradient.mul_(scale) for gradient in gradients
        )
        return grad_states, None, grad_weight, grad_bias, None, None


def _loss_and_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the summed cross-entropy of fp32 logits (K, V) and replace them by its gradient. Targets are (K, 1)."""
    largest, wanted = logits.amax(1, keepdim=True), logits.gather(1, targets)
    total = logits.sub_(largest).exp_().sum(1, keepdim=True)
    logits.div_(total).scatter_add_(1, targets, -torch.ones_like(wanted))
    return (total.log() + largest - wanted).sum()
