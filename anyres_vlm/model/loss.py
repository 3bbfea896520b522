"""Next-token cross-entropy, summed, with the language-model head run only where a label is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from anyres_vlm.schema import IGNORE_INDEX

CHUNK = 2048  # supervised positions whose logits live at once: 2048 x 32064 in fp32 are 263 MB


def next_token_targets(labels: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The label that each position has to predict. (1, L) -> (L,); none across a document's end."""
    targets = torch.full_like(labels[0], IGNORE_INDEX)
    targets[:-1] = labels[0, 1:]
    targets[cu_seqlens[1:].long() - 1] = IGNORE_INDEX
    return targets


def summed_loss(hidden: Tensor, labels: Tensor, cu_seqlens: Tensor, head: nn.Module) -> Tensor:
    """Sum of the cross-entropy in nats over all supervised positions, in fp32. (1, L, D), (1, L) -> ().

    The caller divides by the number of supervised tokens of the whole optimizer step. Beyond `CHUNK` positions the
    logits are recomputed in the backward pass, so memory does not grow with the sequence.
    """
    targets = next_token_targets(labels, cu_seqlens)
    positions = torch.nonzero(targets != IGNORE_INDEX).squeeze(1)
    states, wanted = hidden[0, positions], targets[positions]
    if len(positions) <= CHUNK:
        return _chunk_loss(states, wanted, head)
    total = states.new_zeros((), dtype=torch.float32)
    for part, want in zip(torch.split(states, CHUNK), torch.split(wanted, CHUNK), strict=True):
        total = total + checkpoint(_chunk_loss, part, want, head, use_reentrant=False)
    return total


def _chunk_loss(states: Tensor, targets: Tensor, head: nn.Module) -> Tensor:
    return F.cross_entropy(head(states).float(), targets, reduction="sum")
