"""Train, evaluate and serve AnyRes high-resolution vision-language models of the LLaVA-NeXT family.

The names below are the public surface; each is imported from its own module when it is first used, so that counting
tokens does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names, for whoever reads types
    from anyres_vlm.checkpoints.load_save import load_pretrained as load_pretrained, save_pretrained as save_pretrained
    from anyres_vlm.config import RunConfig as RunConfig, load_config as load_config
    from anyres_vlm.data.index.table import Index as Index, read_index as read_index
    from anyres_vlm.data.packing.plan import Plan as Plan, plan_epoch as plan_epoch
    from anyres_vlm.data.sources import Source as Source, open_source as open_source
    from anyres_vlm.data.tiling import tile_image as tile_image
    from anyres_vlm.errors import DataError as DataError, UsageError as UsageError
    from anyres_vlm.geometry import (
        Grid as Grid,
        Size as Size,
        TilePlan as TilePlan,
        Tiling as Tiling,
        count_tokens as count_tokens,
        plan_tiles as plan_tiles,
    )
    from anyres_vlm.inference.assistant import Answer as Answer, Assistant as Assistant, Conversation as Conversation
    from anyres_vlm.inference.generation import Decoding as Decoding
    from anyres_vlm.model.vlm import VisionLanguageModel as VisionLanguageModel
    from anyres_vlm.schema import Batch as Batch, ImageRef as ImageRef, Record as Record, Sample as Sample, Turn as Turn

__version__ = "0.1.0"

_HOMES = {
    "config": "RunConfig load_config",
    "data.index.table": "Index read_index",
    "data.packing.plan": "Plan plan_epoch",
    "data.sources": "Source open_source",
    "data.tiling": "tile_image",
    "errors": "DataError UsageError",
    "geometry": "Grid Size TilePlan Tiling count_tokens plan_tiles",
    "inference.assistant": "Answer Assistant Conversation",
    "inference.generation": "Decoding",
    "checkpoints.load_save": "load_pretrained save_pretrained",
    "model.vlm": "VisionLanguageModel",
    "schema": "Batch ImageRef Record Sample Turn",
}
_HOME = {name: f"{__name__}.{module}" for module, names in _HOMES.items() for name in names.split()}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
