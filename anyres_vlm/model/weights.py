"""Weights into a model: other layouts' names changed, dtypes kept or cast, nothing missing, nothing left over."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from anyres_vlm.errors import DataError
from anyres_vlm.model.vlm import VisionLanguageModel

Renamings = Sequence[tuple[str, str]]
"""Regular expressions of the start of a name and what stands there instead; the first that fits is taken."""

HEAD = "language_model.lm_head.weight"
STOCK_NAMES: Renamings = (
    # Released files and ours carry `vision_tower.vision_model.` and `language_model.model.`; files of transformers 5
    # lack the first, and what its models name their parts in memory has `model.` before all and no second.
    (r"(?:model\.)?vision_tower\.(?:vision_model\.)?", "vision_tower.vision_model."),
    (r"(?:model\.)?(multi_modal_projector\.|image_newline$)", r"\1"),
    (r"model\.language_model\.", "language_model.model."),
    (r"lm_head\.", "language_model.lm_head."),
)
# Buffers that older releases saved and newer ones compute.
COMPUTED = re.compile(r"\.embeddings\.position_ids$|\.rotary_emb\.inv_freq$")


def renamed(name: str, renamings: Renamings) -> str:
    """The name in this package's model."""
    for pattern, replacement in renamings:
        if match := re.match(pattern, name):
            return match.expand(replacement) + name[match.end() :]
    return name


def load_weights(
    model: VisionLanguageModel, tensors: Iterable[tuple[str, Tensor]], folder: Path, dtype: torch.dtype | None
) -> None:
    """Take tensors of this package's names over, cast to `dtype` or as they are. The model's own memory is replaced.

    Word embeddings are tied where the configuration says so and the folder holds no other head. Raises `DataError` for
    a name or a shape that does not fit.
    """
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if COMPUTED.search(name):
            continue
        if name not in expected or tensor.shape != expected[name]:
            wanted = f"expected {tuple(expected[name])}" if name in expected else "no such weight was expected"
            raise DataError(f"{folder}: {name} of shape {tuple(tensor.shape)}: {wanted}, as its config.json says")
        if not tensor.is_floating_point():
            raise DataError(f"{folder}: {name} holds {tensor.dtype}, expected floating-point numbers")
        found[name] = tensor.to(dtype or tensor.dtype, copy=True)  # a copy: the file's memory is one piece
    config, embeddings = model.language_model.config, model.language_model.get_input_embeddings().weight
    if config.tie_word_embeddings and HEAD in found:
        name = next(name for name, parameter in model.named_parameters() if parameter is embeddings)
        config.tie_word_embeddings = name not in found or torch.equal(found[HEAD], found[name])
    missing = expected.keys() - found.keys() - ({HEAD} if config.tie_word_embeddings else set())
    if missing:
        raise DataError(
            f"{folder}: weights missing: {', '.join(sorted(missing)[:3])}; use a complete checkpoint folder"
        )
    model.load_state_dict(found, strict=False, assign=True)
    model.language_model.tie_weights()
