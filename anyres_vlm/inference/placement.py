"""Placement of a model for inference: on one device or split over all GPUs, as loaded or in 4 or 8 bits."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Literal

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import CustomDtype, get_max_memory

from anyres_vlm.errors import UsageError
from anyres_vlm.model.quantize import Load, quantize
from anyres_vlm.model.vlm import VisionLanguageModel

logger = logging.getLogger(__name__)

Devices = Literal["auto"]
DeviceMap = dict[str, int | str]
KEPT_FREE = 0.15  # share of each GPU's free memory for keys, values and activations
PACKED_DTYPES = {"4bit": CustomDtype.INT4, "8bit": torch.int8, None: None}


def place_model(model: VisionLanguageModel, device: torch.device, load: Load | None, devices: Devices | None) -> None:
    """Move a model to a device, or its decoder layers to all GPUs and the rest to the first if `devices` is `auto`.

    With `load`, the linear layers of the decoder are quantised on their devices. Raises `UsageError` for a model that
    does not fit the GPUs.
    """
    model.eval().requires_grad_(False)
    device_map: DeviceMap = {}
    if devices == "auto" and torch.cuda.device_count() > 1:
        memory = {number: free for number, free in get_max_memory().items() if number != "cpu"}
        device_map = plan_devices(model, memory, load)
        logger.info("layers on each GPU: %s", _counts(device_map))
    if load is not None:
        prefix = f"{model.language_model.base_model_prefix}."
        quantize(model.language_model, load, lambda name: torch.device(_find(device_map, name, prefix, device)))
    if device_map:
        for name, part in model.named_children():
            if name != "language_model":
                part.to(device)
        model.image_newline.data = model.image_newline.data.to(device)
        model.language_model.get_output_embeddings().to(device)
        split(model, device_map, device)
    else:
        model.to(device)


def plan_devices(model: VisionLanguageModel, memory: Mapping[int, int], load: Load | None) -> DeviceMap:
    """Return the device of each part of the decoder, given the free bytes of each GPU, by accelerate's device map.

    Embeddings stay on the first GPU, with the encoder, the projector and the head. Raises `UsageError` for a model that
    does not fit.
    """
    decoder, first = model.language_model.base_model, min(memory)
    others = sum(part.nbytes for name, part in model.named_parameters() if not name.startswith("language_model."))
    head = model.language_model.get_output_embeddings().weight
    room = {number: int(free * (1 - KEPT_FREE)) for number, free in memory.items()}
    room[first] = max(room[first] - others - head.nbytes, 0)
    device_map: DeviceMap = infer_auto_device_map(
        decoder,
        max_memory=room,
        no_split_module_classes=list(model.language_model._no_split_modules or ()),
        dtype=PACKED_DTYPES[load],
    )
    outside = [name for name, place in device_map.items() if place in ("cpu", "disk")]
    if outside or device_map.get("embed_tokens", first) != first:
        free = sum(memory.values()) / 1e9
        less = {None: "--load 8bit or 4bit, or ", "8bit": "--load 4bit, or ", "4bit": ""}[load]
        raise UsageError(
            f"--devices auto: the model does not fit the {free:.0f} GB that {len(memory)} GPUs have free: use {less}"
            "more or larger GPUs"
        )
    return device_map


def split(
    model: VisionLanguageModel, device_map: DeviceMap, device: torch.device, offload_dir: str | None = None
) -> None:
    """Move the parts of the decoder to their devices, with hooks that move what flows through them."""
    dispatch_model(
        model.language_model.base_model,
        device_map,
        main_device=device,
        offload_dir=offload_dir,
        skip_keys=getattr(model.language_model, "_skip_keys_device_placement", None),
        force_hooks=True,
    )


def _find(device_map: DeviceMap, name: str, prefix: str, default: torch.device) -> torch.device | int | str:
    """Return the device of the part of the decoder that a layer is in."""
    own = name.removeprefix(prefix)
    return next((place for part, place in device_map.items() if f"{own}.".startswith(f"{part}.")), default)


def _counts(device_map: DeviceMap) -> str:
    layers = [place for name, place in device_map.items() if name.rpartition(".")[2].isdecimal()]
    return ", ".join(f"{layers.count(place)} on {place}" for place in dict.fromkeys(layers))
