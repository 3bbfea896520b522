"""Weights of transformers' Dinov2, also when an ONNX export took their names, compute the same in timm."""

from pathlib import Path
from typing import Any

import pytest
import torch
from dinov2 import backbone_weights, timm_weights
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from anyres_vlm.errors import DataError

ATOL = 1e-5  # equal in 5 seeds in fp32 on one CPU; another may sum in another order


def checkpoint(folder: Path, model: Dinov2Model) -> dict[str, Tensor]:
    """Its weights under the names that transformers saves."""
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    del weights["embeddings.mask_token"]  # of the pretraining; the export has no use for it
    return weights


@pytest.fixture
def dinov2() -> Dinov2Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Dinov2Config(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=42,
            patch_size=14,
            layerscale_value=0.5,
        )
        model = Dinov2Model(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        return model


def test_renamed_weights_compute_the_same_in_timm(tmp_path: Path, dinov2: Dinov2Model) -> None:
    network = VisionTransformer(
        img_size=42, patch_size=14, embed_dim=32, depth=2, num_heads=4, init_values=1.0, num_classes=0
    ).eval()
    network.load_state_dict(timm_weights(checkpoint(tmp_path, dinov2)))
    pixels = torch.randn(2, 3, 42, 42, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            network.forward_features(pixels), dinov2(pixels).last_hidden_state, atol=ATOL, rtol=0
        )


def exported(onnx: Any, weights: dict[str, Tensor], nodes_of: str = "/backbone/") -> Any:
    """A graph that holds weights as the exporter does: matrices transposed and nameless, positions in two parts."""
    positions = weights["embeddings.position_embeddings"]
    parts = {"Concat": positions[:, :1], "Reshape": positions[:, 1:]}
    stored, nodes = {}, []
    for number, (name, value) in enumerate(weights.items()):
        if name.startswith("encoder.") and value.ndim == 2:
            stored[f"onnx::MatMul_{number}"] = value.T.contiguous()
            node_name = (
                nodes_of + name.removesuffix(".weight").replace(".", "/").replace("layer/", "layer.") + "/MatMul"
            )
            nodes.append(onnx.helper.make_node("MatMul", ["x", f"onnx::MatMul_{number}"], ["y"], name=node_name))
        elif name != "embeddings.position_embeddings":
            stored[f"backbone.{name}"] = value
    for kind, value in parts.items():
        stored[f"onnx::{kind}_9"] = value
        nodes.append(onnx.helper.make_node(kind, [f"onnx::{kind}_9", "x"], ["y"], name=f"{nodes_of}embeddings/{kind}"))
    stored["decoder.bias"] = torch.zeros(3)
    tensors = [onnx.numpy_helper.from_array(value.numpy(), name) for name, value in stored.items()]
    return onnx.helper.make_graph(nodes, "graph", [], [], initializer=tensors)


def test_export_gives_back_every_weight(tmp_path: Path, dinov2: Dinov2Model) -> None:
    onnx = pytest.importorskip("onnx")
    weights = checkpoint(tmp_path, dinov2)
    found = backbone_weights(exported(onnx, weights))
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], value) for name, value in weights.items())


def test_graph_of_something_else_is_refused(tmp_path: Path, dinov2: Dinov2Model) -> None:
    onnx = pytest.importorskip("onnx")
    with pytest.raises(DataError, match=r"expected the positions .* got \[\]"):
        backbone_weights(exported(onnx, checkpoint(tmp_path, dinov2), nodes_of="/other/"))
