"""Memory of one micro-step in addition to weights and gradients, measured on torch's fake tensors.

The real modules run forward and backward, so that saved activations, recomputation and the chunked loss need no second
description here. Models of one and two layers are traced; every further layer adds as much as the second one.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from anyres_vlm.checkpoints.bases import skeleton
from anyres_vlm.checkpoints.describe import describe_bases
from anyres_vlm.config import RunConfig, StageName
from anyres_vlm.model.attention import Documents
from anyres_vlm.model.lora import add_lora
from anyres_vlm.model.loss import chunk_positions, summed_loss
from anyres_vlm.model.vlm import VisionLanguageModel
from anyres_vlm.train.recipe import freeze, frozen_matrices, recompute_activations, trained_rates

Numbers = Literal["fp32", "bf16", "autocast"]
"""Dtypes of weights and activations: both fp32, both bf16, or `autocast`: trained weights in fp32, which are cast on
use, and frozen matrices in bf16."""

FEW_LAYERS = (1, 2)


@dataclass(frozen=True)
class PackSize:
    """Numbers of positions, of documents of equal length, of tiles and of supervised positions in a pack."""

    tokens: int
    documents: int
    tiles: int
    supervised: int

    @property
    def lengths(self) -> list[int]:
        """Lengths of the documents; the last one has the remainder."""
        each = self.tokens // self.documents
        return [each] * (self.documents - 1) + [self.tokens - each * (self.documents - 1)]


@dataclass(frozen=True)
class StepBytes:
    """Bytes besides weights and gradients: peak of the forward pass, held after it, peak of the backward pass."""

    forward: int
    held: int
    backward: int

    @property
    def peak(self) -> int:
        """The peak of the micro-step."""
        return max(self.forward, self.backward)

    def extrapolate(self, fewer: StepBytes, layers: int) -> StepBytes:
        """Return the bytes of a model with `layers` more layers; `fewer` is of a model with one layer less."""
        pairs = zip(astuple(self), astuple(fewer), strict=True)
        return StepBytes(*(more + layers * (more - less) for more, less in pairs))


def stage_skeleton(config: RunConfig, stage: StageName, layers: int | None = None) -> VisionLanguageModel:
    """Return the model as a stage trains it, with adapters, checkpointing and frozen parameters."""
    settings, rates = config.stage(stage), trained_rates(config, stage)
    model = skeleton(config.model, layers)
    if settings.lora is not None:
        add_lora(model, settings.lora, config.seed)
    recompute_activations(model, settings.activation_checkpointing, rates)
    freeze(model, rates)
    return model


def micro_step_bytes(
    config: RunConfig, stage: StageName, packs: Sequence[PackSize], numbers: Numbers
) -> list[StepBytes]:
    """Return the bytes of each pack's forward and backward pass in a stage."""
    layers: int = describe_bases(config.model).text_config.num_hidden_layers
    period = max(int(config.stage(stage).activation_checkpointing), 1)  # layers after which checkpointing repeats
    more = FEW_LAYERS[-1] * period
    if layers <= more:
        return _trace(config, stage, packs, numbers, layers)
    traces = zip(*(_trace(config, stage, packs, numbers, count * period) for count in FEW_LAYERS), strict=True)
    return [last.extrapolate(first, math.ceil((layers - more) / period)) for first, last in traces]


def _trace(
    config: RunConfig, stage: StageName, packs: Sequence[PackSize], numbers: Numbers, layers: int
) -> list[StepBytes]:
    with torch.device("meta"):
        model = stage_skeleton(config, stage, layers)
    with FakeTensorMode():
        _make_fake(model, numbers)
        return [_trace_pack(model, pack, numbers) for pack in packs]


def _make_fake(model: VisionLanguageModel, numbers: Numbers) -> None:
    """Replace a model's meta tensors by fake ones; tied ones stay tied. Gradients are released as they are computed."""
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # old tensors are kept, so that no id is reused
    halved = {id(weight) for weight in frozen_matrices(model)} if numbers == "autocast" else set()
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None and id(old) not in made:
                dtype = torch.bfloat16 if numbers == "bf16" or id(old) in halved else old.dtype
                new = nn.Parameter(torch.empty(old.shape, dtype=dtype), requires_grad=old.requires_grad)
                made[id(old)] = old, new
                if new.requires_grad:
                    new.register_post_accumulate_grad_hook(_release)  # type: ignore[no-untyped-call]
            if old is not None:
                module._parameters[name] = made[id(old)][1]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)


def _trace_pack(model: VisionLanguageModel, pack: PackSize, numbers: Numbers) -> StepBytes:
    batch = _FakeBatch(pack, model.vision_tower.tile)
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=numbers == "autocast"):
            loss = _loss(model, pack, batch)
        forward, held = live.restart(), live.now
        loss.backward()  # type: ignore[no-untyped-call]
    return StepBytes(forward, held, live.restart())


class _FakeBatch:
    def __init__(self, pack: PackSize, side: int) -> None:
        self.tokens = torch.zeros((1, pack.tokens), dtype=torch.int64)
        self.boundaries = torch.zeros(pack.documents + 1, dtype=torch.int32)
        self.tiles = torch.zeros((max(pack.tiles, 1), 3, side, side), dtype=torch.uint8)
        self.positions = torch.zeros(pack.supervised, dtype=torch.int64)


def _loss(model: VisionLanguageModel, pack: PackSize, batch: _FakeBatch) -> Tensor:
    """Compute the loss as the model's `forward` does, without operations that read the content of a tensor."""
    projected = model.multi_modal_projector(model.vision_tower(batch.tiles))
    embedded = model.language_model.get_input_embeddings()(batch.tokens)
    visual = projected.flatten(0, 1) + 0.0 * model.image_newline.to(projected.dtype)
    image_positions = batch.tokens[0].new_empty(len(visual))
    merged = embedded.index_copy(1, image_positions, visual.to(embedded.dtype)[None])
    hidden = model.language_model.base_model(
        inputs_embeds=merged,
        position_ids=batch.tokens,
        documents=Documents(batch.boundaries, pack.lengths),
        use_cache=False,
    ).last_hidden_state
    head: Any = model.language_model.get_output_embeddings()
    chunk = chunk_positions(head.out_features, "cuda")  # traced on fake CPU tensors, but used on a GPU
    return summed_loss(hidden, batch.positions, batch.positions, head, chunk)


def _release(parameter: Tensor) -> None:
    parameter.grad = None


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the bytes of all live storages that were created under this mode; `known` tensors do not count."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def restart(self) -> int:
        """Return the peak since the last call and start a new one."""
        peak, self.peak = self.peak, self.now
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
